//! A protobuf message as a tree, whatever it is of (<https://protobuf.dev/programming-guides/encoding/>), so that a part of it can be
//! changed and all the lengths around it still fit.

/// A field with its number.
#[derive(Clone)]
pub(super) struct Field {
    number: u64,
    value: Value,
}

#[derive(Clone)]
enum Value {
    Varint(u64),
    Fixed(Vec<u8>),
    Text(Vec<u8>),
    Message(Vec<Field>),
}

/// What a field may become. The argument is for the change to use as it likes.
#[derive(Clone, Copy)]
pub(super) enum Change {
    Remove,
    Repeat,
    Number(u64),
    Value(u64),
    /// Flips a bit of a text, or makes a message one.
    Spoil(usize),
    Shorten(usize),
    Say(&'static str),
}

/// `None`: it is none, or not likely to be one.
pub(super) fn parse(mut bytes: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let value = match tag & 7 {
            0 => Value::Varint(varint(&mut bytes)?),
            1 => Value::Fixed(bytes.split_off(..8)?.to_vec()),
            5 => Value::Fixed(bytes.split_off(..4)?.to_vec()),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let inner = bytes.split_off(..length)?;
                let is_text = inner.is_empty() || inner.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
                parse(inner).filter(|_| !is_text).map_or_else(|| Value::Text(inner.to_vec()), Value::Message)
            }
            _ => return None,
        };
        fields.push(Field { number: tag >> 3, value });
    }
    Some(fields)
}

pub(super) fn write(fields: &[Field]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Field { number, value } in fields {
        let mut tag = |kind| put_varint(&mut bytes, number << 3 | kind);
        match value {
            Value::Varint(value) => {
                tag(0);
                put_varint(&mut bytes, *value);
            }
            Value::Fixed(value) => {
                tag(if value.len() == 8 { 1 } else { 5 });
                bytes.extend_from_slice(value);
            }
            Value::Text(value) => {
                tag(2);
                put_varint(&mut bytes, value.len() as u64);
                bytes.extend_from_slice(value);
            }
            Value::Message(fields) => {
                tag(2);
                let value = write(fields);
                put_varint(&mut bytes, value.len() as u64);
                bytes.extend_from_slice(&value);
            }
        }
    }
    bytes
}

/// Fields, those of inner messages included.
pub(super) fn count(fields: &[Field]) -> usize {
    let inner = |field: &Field| if let Value::Message(inner) = &field.value { count(inner) } else { 0 };
    fields.iter().map(|field| 1 + inner(field)).sum()
}

/// Changes one field, counted as by [`count`].
pub(super) fn change(fields: &mut Vec<Field>, mut which: usize, how: Change) {
    for at in 0..fields.len() {
        if which == 0 {
            return change_at(fields, at, how);
        }
        which -= 1;
        if let Value::Message(inner) = &mut fields[at].value {
            let size = count(inner);
            if which < size {
                return change(inner, which, how);
            }
            which -= size;
        }
    }
}

fn change_at(fields: &mut Vec<Field>, at: usize, how: Change) {
    let field = &mut fields[at];
    match (how, &mut field.value) {
        (Change::Remove, _) => drop(fields.remove(at)),
        (Change::Repeat, _) => {
            let again = field.clone();
            fields.insert(at, again);
        }
        (Change::Number(number), _) => field.number = number % 40 + 1,
        (Change::Value(number), Value::Varint(value)) => *value = number,
        (Change::Value(number), _) => field.value = Value::Varint(number),
        (Change::Spoil(bit), Value::Text(text) | Value::Fixed(text)) if !text.is_empty() => {
            let at = bit / 8 % text.len();
            text[at] ^= 1 << (bit % 8);
        }
        (Change::Spoil(_), Value::Message(inner)) => field.value = Value::Text(write(inner)),
        (Change::Shorten(length), Value::Text(text)) => text.truncate(length),
        (Change::Shorten(length), Value::Message(inner)) => inner.truncate(length),
        (Change::Spoil(_) | Change::Shorten(_), _) => {}
        (Change::Say(text), _) => field.value = Value::Text(text.as_bytes().to_vec()),
    }
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}
