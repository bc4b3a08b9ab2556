//! How bodies are framed: one is taken from what was read, another added to what is to be written.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, header};

use super::head::{self, MAX_HEADERS, Malformed};

/// Most bytes of chunk extensions in one body: nobody reads them, and a flood of them would be work without content.
const MAX_EXTENSIONS: usize = 16 * 1024;
/// Most bytes of trailers.
const MAX_TRAILERS: usize = 16 * 1024;

/// What is left of a body to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decoder {
    Length(u64),
    Chunked(Chunked),
    /// Its end is the connection's. Only an answer's body is so.
    UntilClose,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunked {
    state: State,
    /// Bytes of extensions so far.
    extensions: usize,
}

/// Where in a chunked body the next byte is (RFC 9112, 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Size {
        size: u64,
        digits: u8,
    },
    /// White space behind the size, which some servers pad it with.
    Padding(u64),
    Extension(u64),
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    Trailers,
    Ended,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
    /// More must be read first.
    Read,
}

impl Decoder {
    pub(super) fn length(length: u64) -> Self {
        Self::Length(length)
    }

    pub(super) fn chunked() -> Self {
        Self::Chunked(Chunked { state: State::Size { size: 0, digits: 0 }, extensions: 0 })
    }

    /// Whether the body has ended.
    pub(super) fn is_ended(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunked) => chunked.state == State::Ended,
            Self::UntilClose => false,
        }
    }

    /// Bytes that are left, if that is known.
    pub(super) fn left(&self) -> Option<u64> {
        match self {
            Self::Length(left) => Some(*left),
            Self::Chunked(_) | Self::UntilClose => None,
        }
    }

    /// Takes the next part of the body from `input`.
    pub(super) fn decode(&mut self, input: &mut BytesMut) -> Result<Step, Malformed> {
        match self {
            Self::Length(0) => Ok(Step::End),
            Self::Length(left) => Ok(take(input, left)),
            Self::Chunked(chunked) => chunked.decode(input),
            Self::UntilClose if input.is_empty() => Ok(Step::Read),
            Self::UntilClose => Ok(Step::Data(input.split().freeze())),
        }
    }
}

fn take(input: &mut BytesMut, left: &mut u64) -> Step {
    if input.is_empty() {
        return Step::Read;
    }
    let length = usize::try_from(*left).map_or(input.len(), |left| left.min(input.len()));
    *left -= length as u64;
    Step::Data(input.split_to(length).freeze())
}

impl Chunked {
    fn decode(&mut self, input: &mut BytesMut) -> Result<Step, Malformed> {
        loop {
            match &mut self.state {
                State::Data(left) => {
                    let step = take(input, left);
                    if *left == 0 {
                        self.state = State::DataCr;
                    }
                    return Ok(step);
                }
                State::Trailers => {
                    let before = input.len();
                    return Ok(match head::read_trailers(input)? {
                        // When all of them came at once, too.
                        Some(_) if before - input.len() > MAX_TRAILERS => return Err(Malformed::Trailers),
                        None if input.len() >= MAX_TRAILERS => return Err(Malformed::Trailers),
                        None => Step::Read,
                        Some(trailers) => {
                            self.state = State::Ended;
                            let trailers = forwardable(trailers);
                            if trailers.is_empty() { Step::End } else { Step::Trailers(trailers) }
                        }
                    });
                }
                State::Ended => return Ok(Step::End),
                State::Size { .. }
                | State::Padding(_)
                | State::Extension(_)
                | State::SizeLf(_)
                | State::DataCr
                | State::DataLf => {
                    let Some(byte) = input.first().copied() else {
                        return Ok(Step::Read);
                    };
                    input.advance(1);
                    self.state = self.next(byte)?;
                }
            }
        }
    }

    /// The state behind `byte` of a size line or of the end of a chunk. Only CR LF ends a line here: a lone LF is what
    /// two implementations read differently.
    fn next(&mut self, byte: u8) -> Result<State, Malformed> {
        let behind_size = |size| match byte {
            b' ' | b'\t' => Ok(State::Padding(size)),
            b';' => Ok(State::Extension(size)),
            b'\r' => Ok(State::SizeLf(size)),
            _ => Err(Malformed::ChunkSize),
        };
        match self.state {
            State::Size { size, digits } => match char::from(byte).to_digit(16) {
                // 15 digits are less than an exabyte, and cannot overflow.
                Some(digit) if digits < 15 => {
                    Ok(State::Size { size: size * 16 + u64::from(digit), digits: digits + 1 })
                }
                Some(_) => Err(Malformed::ChunkSize),
                None if digits == 0 => Err(Malformed::ChunkSize),
                None => behind_size(size),
            },
            State::Padding(size) => {
                self.count_extension()?;
                behind_size(size)
            }
            State::Extension(size) => {
                self.count_extension()?;
                match byte {
                    b'\r' => Ok(State::SizeLf(size)),
                    b'\n' => Err(Malformed::ChunkSize),
                    _ => Ok(State::Extension(size)),
                }
            }
            State::SizeLf(size) => match (byte, size) {
                (b'\n', 0) => Ok(State::Trailers),
                (b'\n', size) => Ok(State::Data(size)),
                _ => Err(Malformed::ChunkSize),
            },
            State::DataCr if byte == b'\r' => Ok(State::DataLf),
            State::DataLf if byte == b'\n' => Ok(State::Size { size: 0, digits: 0 }),
            State::DataCr | State::DataLf => Err(Malformed::ChunkEnd),
            State::Data(_) | State::Trailers | State::Ended => Ok(self.state),
        }
    }

    fn count_extension(&mut self) -> Result<(), Malformed> {
        self.extensions += 1;
        if self.extensions > MAX_EXTENSIONS { Err(Malformed::ChunkExtensions) } else { Ok(()) }
    }
}

/// How a body is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Encoder {
    /// Bytes that are left.
    Length(u64),
    /// With the trailers that may be sent.
    Chunked { trailers: Vec<HeaderName> },
    /// Its end is the connection's: an answer's in HTTP/1.0, of unknown length.
    UntilClose,
}

impl Encoder {
    /// `announces` are the headers of a message whose trailers are wanted. Those that it has announced may be sent
    /// (RFC 9110, 6.6.2).
    pub(super) fn chunked(announces: Option<&HeaderMap>) -> Self {
        let values = announces.into_iter().flat_map(|headers| headers.get_all(header::TRAILER));
        let names = values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
        let names = names.filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok());
        Self::Chunked { trailers: names.filter(may_trail).take(MAX_HEADERS).collect() }
    }

    /// Puts what goes before the next `length` bytes of the body. `false`: these are more than the head announced.
    pub(super) fn begin_data(&mut self, length: usize, output: &mut Vec<u8>) -> bool {
        match self {
            Self::Length(left) => match left.checked_sub(length as u64) {
                Some(less) => {
                    *left = less;
                    true
                }
                None => false,
            },
            Self::UntilClose => true,
            Self::Chunked { .. } => {
                // Writing to a Vec cannot fail.
                let _ = std::io::Write::write_fmt(output, format_args!("{length:x}\r\n"));
                true
            }
        }
    }

    /// What goes behind these bytes.
    pub(super) fn behind_data(&self) -> &'static [u8] {
        match self {
            Self::Length(_) | Self::UntilClose => b"",
            Self::Chunked { .. } => b"\r\n",
        }
    }

    /// Puts the end of the body. `false`: it is shorter than the head announced.
    pub(super) fn end(&mut self, trailers: Option<&HeaderMap>, output: &mut Vec<u8>) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::UntilClose => true,
            Self::Chunked { trailers: announced } => {
                output.extend_from_slice(b"0\r\n");
                for (name, value) in trailers.into_iter().flatten() {
                    if announced.contains(name) {
                        head::write_line(output, name, value);
                    }
                }
                output.extend_from_slice(b"\r\n");
                true
            }
        }
    }
}

/// Trailers without those that must not be: HTTP/2 passes on what it is given.
pub(super) fn forwardable(mut trailers: HeaderMap) -> HeaderMap {
    if trailers.keys().any(|name| !may_trail(name)) {
        let refused: Vec<HeaderName> = trailers.keys().filter(|name| !may_trail(name)).cloned().collect();
        for name in refused {
            trailers.remove(name);
        }
    }
    trailers
}

/// What frames, routes or controls a message must not come behind it (RFC 9110, 6.5.1).
fn may_trail(name: &HeaderName) -> bool {
    ![
        header::AUTHORIZATION,
        header::CACHE_CONTROL,
        header::CONNECTION,
        header::CONTENT_ENCODING,
        header::CONTENT_LENGTH,
        header::CONTENT_RANGE,
        header::CONTENT_TYPE,
        header::EXPECT,
        header::HOST,
        header::MAX_FORWARDS,
        header::SET_COOKIE,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
    ]
    .contains(name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    /// Decodes `parts`, each as if read by one call. Returns content, trailers, and what was left over.
    fn decode(mut decoder: Decoder, parts: &[&[u8]]) -> Result<Option<(Vec<u8>, HeaderMap, BytesMut)>, Malformed> {
        let (mut content, mut trailers, mut input) = (Vec::new(), HeaderMap::new(), BytesMut::new());
        let mut ended = false;
        for part in parts {
            input.extend_from_slice(part);
            loop {
                match decoder.decode(&mut input)? {
                    Step::Data(data) => content.extend_from_slice(&data),
                    Step::Trailers(read) => trailers = read,
                    Step::End => {
                        ended = true;
                        break;
                    }
                    Step::Read => break,
                }
            }
        }
        Ok(ended.then_some((content, trailers, input)))
    }

    #[test]
    fn a_body_is_the_same_however_it_is_cut() {
        let chunked = "4\r\nWiki\r\nA;a=b;c=\"d\"\r\n0123456789\r\n00  ;x\r\nx-sum: 1\r\nx-b:\r\n\r\nrest";
        let table = [
            (Decoder::length(5), "hellorest", "hello", 0),
            (Decoder::length(0), "rest", "", 0),
            (Decoder::chunked(), "5\r\nhello\r\n0\r\n\r\nrest", "hello", 0),
            (Decoder::chunked(), "0\r\n\r\nrest", "", 0),
            (Decoder::chunked(), chunked, "Wiki0123456789", 2),
        ];
        for (decoder, text, content, trailers) in table {
            for cut in 0..=text.len() {
                let (first, second) = text.as_bytes().split_at(cut);
                let (read, lines, left) = decode(decoder, &[first, second]).unwrap().unwrap();
                assert_eq!((read.as_slice(), lines.len()), (content.as_bytes(), trailers), "{text:?} at {cut}");
                assert_eq!(&left[..], b"rest");
            }
            let bytes: Vec<&[u8]> = text.as_bytes().chunks(1).collect();
            assert_eq!(decode(decoder, &bytes).unwrap().unwrap().0, content.as_bytes());
            // Not whole before its end.
            let whole = text.len() - "rest".len();
            assert!((0..whole).all(|length| decode(decoder, &[&text.as_bytes()[..length]]).unwrap().is_none()));
        }
        assert_eq!(decode(Decoder::UntilClose, &[b"a", b"b"]), Ok(None));
    }

    #[test]
    fn bad_chunks_are_refused() {
        let table = [
            ("\r\n", Malformed::ChunkSize),
            ("g\r\n", Malformed::ChunkSize),
            ("-1\r\n", Malformed::ChunkSize),
            ("0x5\r\nhello\r\n", Malformed::ChunkSize),
            ("5\nhello\r\n", Malformed::ChunkSize),
            ("5\rhello", Malformed::ChunkSize),
            ("5 5\r\n", Malformed::ChunkSize),
            ("5;a\nhello\r\n", Malformed::ChunkSize),
            ("1234567890123456\r\n", Malformed::ChunkSize),
            ("5\r\nhello!\r\n", Malformed::ChunkEnd),
            ("5\r\nhello\n", Malformed::ChunkEnd),
            ("0\r\nno colon\r\n\r\n", Malformed::Trailers),
            ("0\r\nx: y\r\n folded\r\n\r\n", Malformed::Trailers),
            ("0\r\nx: y\n\r\n", Malformed::Trailers),
            ("0\r\n\n", Malformed::Trailers),
        ];
        for (text, error) in table {
            assert_eq!(decode(Decoder::chunked(), &[text.as_bytes()]), Err(error), "{text:?}");
        }
        let extension = format!("1;{}\r\nx\r\n", "y".repeat(1000)).repeat(17);
        assert_eq!(decode(Decoder::chunked(), &[extension.as_bytes()]), Err(Malformed::ChunkExtensions));
        let trailers = format!("0\r\n{}", format!("x: {}\r\n", "y".repeat(1000)).repeat(17));
        assert_eq!(decode(Decoder::chunked(), &[trailers.as_bytes()]), Err(Malformed::Trailers));
    }

    #[test]
    fn trailers_are_as_long_as_they_may_be_however_they_are_cut() {
        for length in MAX_TRAILERS - 2..MAX_TRAILERS + 3 {
            let text = format!("0\r\nx: {}\r\n\r\n", "y".repeat(length - "x: \r\n\r\n".len()));
            let pieces = |size: usize| decode(Decoder::chunked(), &text.as_bytes().chunks(size).collect::<Vec<_>>());
            let all = [text.len(), 1000, 7].map(|size| pieces(size).is_ok_and(|read| read.is_some()));
            assert_eq!(all, [length <= MAX_TRAILERS; 3], "{length}");
        }
    }

    #[test]
    fn a_request_that_is_longer_or_shorter_than_it_said_is_noticed() {
        let output = &mut Vec::new();
        assert!(!Encoder::Length(3).begin_data(4, output));
        assert!(!Encoder::Length(3).end(None, output));
        assert!(output.is_empty());
    }

    #[test]
    fn announced_trailers_pass_and_others_do_not() {
        let mut headers = HeaderMap::new();
        headers.insert("trailer", "x-sum, content-length".parse().unwrap());
        headers.append("trailer", "X-Two".parse().unwrap());
        let mut trailers = HeaderMap::new();
        for name in ["x-sum", "x-two", "x-other", "content-length"] {
            trailers.insert(name, "1".parse().unwrap());
        }
        let output = &mut Vec::new();
        assert!(Encoder::chunked(Some(&headers)).end(Some(&trailers), output));
        assert_eq!(String::from_utf8_lossy(output), "0\r\nx-sum: 1\r\nx-two: 1\r\n\r\n");
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_the_same(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 0..8),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
            chunked: bool,
            trailer in prop::option::of("[a-z]{1,20}"),
        ) {
            let content = frames.concat();
            let mut headers = HeaderMap::new();
            headers.insert("trailer", "x-sum".parse().unwrap());
            let mut trailers = HeaderMap::new();
            if let (true, Some(value)) = (chunked, &trailer) {
                trailers.insert("x-sum", value.parse().unwrap());
            }
            let mut encoder =
                if chunked { Encoder::chunked(Some(&headers)) } else { Encoder::Length(content.len() as u64) };
            let mut output = Vec::new();
            for frame in &frames {
                prop_assert!(encoder.begin_data(frame.len(), &mut output));
                output.extend_from_slice(frame);
                output.extend_from_slice(encoder.behind_data());
            }
            prop_assert!(encoder.end(Some(&trailers), &mut output));

            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(output.len() + 1)).collect();
            cuts.sort_unstable();
            let (mut parts, mut from) = (Vec::new(), 0);
            for cut in cuts {
                parts.push(&output[from..cut]);
                from = cut;
            }
            parts.push(&output[from..]);
            let decoder = if chunked { Decoder::chunked() } else { Decoder::length(content.len() as u64) };
            let (read, lines, left) = decode(decoder, &parts).unwrap().unwrap();
            prop_assert_eq!(read, content);
            prop_assert_eq!(lines, trailers);
            prop_assert!(left.is_empty());
        }
    }
}
