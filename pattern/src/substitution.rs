//! What is put in place of what an expression matches (RE2's `Rewrite`).

use http::uri::PathAndQuery;

/// A part of a substitution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Text(String),
    /// What this group of the expression has matched; 0 is all of it. Not more than the expression has.
    Group(usize),
}

/// Why a substitution is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubstitutionError {
    #[error("it must name groups that the pattern has")]
    Group,
    #[error("a \\ must be followed by the number of a group or another \\")]
    Escape,
    #[error("it must be part of a path")]
    Path,
}

/// A text with `\1` for what the first group has matched, `\0` for the whole, and `\\` for one `\`. The whole match is one of the
/// `groups`.
///
/// # Errors
/// When it is something else, or nothing that may stand in the target of a request.
pub fn pieces(substitution: &str, groups: usize) -> Result<Vec<Piece>, SubstitutionError> {
    let mut pieces = Vec::new();
    let mut text = String::new();
    let mut rest = substitution.chars();
    while let Some(next) = rest.next() {
        if next != '\\' {
            text.push(next);
            continue;
        }
        match rest.next() {
            Some('\\') => text.push('\\'),
            Some(digit @ '0'..='9') => {
                let group = usize::from(digit as u8 - b'0');
                if group >= groups {
                    return Err(SubstitutionError::Group);
                }
                pieces.push(Piece::Text(std::mem::take(&mut text)));
                pieces.push(Piece::Group(group));
            }
            Some(_) | None => return Err(SubstitutionError::Escape),
        }
    }
    pieces.push(Piece::Text(text));
    pieces.retain(|piece| !matches!(piece, Piece::Text(text) if text.is_empty()));
    let is_good = |piece: &Piece| match piece {
        Piece::Text(text) => is_part_of_target(text),
        Piece::Group(_) => true,
    };
    if pieces.iter().all(is_good) { Ok(pieces) } else { Err(SubstitutionError::Path) }
}

/// Whether a text may be sent behind the first `/` of a request's target. A fragment is never sent (RFC 9112, 3.2).
#[must_use]
pub fn is_part_of_target(text: &str) -> bool {
    !text.contains('#') && PathAndQuery::try_from(format!("/{text}")).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_substitution_names_groups_and_is_part_of_a_path() {
        let group = Piece::Group;
        let text = |text: &str| Piece::Text(text.to_owned());
        let table = [
            (r"/v2/\1", Ok(vec![text("/v2/"), group(1)])),
            (r"\0\1", Ok(vec![group(0), group(1)])),
            (r"a\\b", Ok(vec![text("a\\b")])),
            ("", Ok(vec![])),
            (r"/\2", Err(SubstitutionError::Group)),
            (r"/\x", Err(SubstitutionError::Escape)),
            (r"/a\", Err(SubstitutionError::Escape)),
            ("/a#b", Err(SubstitutionError::Path)),
            ("/a b", Err(SubstitutionError::Path)),
        ];
        for (substitution, expected) in table {
            assert_eq!(pieces(substitution, 2), expected, "{substitution}");
        }
    }
}
