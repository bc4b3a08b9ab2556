//! The text of the annotation `sluice.dev/action`: `VERB:REVISION`, or `VERB:REVISION:NOTE`. The note has no meaning but to
//! make another value of it.

use sluice_crds::{CanaryStatus, Verb, labels};

use crate::cache::CanaryKey;

/// Most bytes of a value, by the schema of `status.action.value`.
pub const MOST: usize = 253;
/// Most values that are remembered as handled.
pub const REMEMBERED: usize = 32;

const ALL: [Verb; 6] = [Verb::Promote, Verb::Abort, Verb::Retry, Verb::Pause, Verb::Resume, Verb::Rollback];

#[must_use]
pub fn word(verb: Verb) -> &'static str {
    match verb {
        Verb::Promote => "promote",
        Verb::Abort => "abort",
        Verb::Retry => "retry",
        Verb::Pause => "pause",
        Verb::Resume => "resume",
        Verb::Rollback => "rollback",
    }
}

/// Whether a value of this verb is remembered and counts once. It approved, or took back, one release: kept in Git and applied again, it must not do
/// so with a later release of the same revision. `pause` and `resume` take turns in one release and raise nothing unjudged.
#[must_use]
pub fn counts_once(verb: Verb) -> bool {
    match verb {
        Verb::Promote | Verb::Abort | Verb::Retry | Verb::Rollback => true,
        Verb::Pause | Verb::Resume => false,
    }
}

/// A value that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unclear {
    #[error(
        "{0:?} is not an action: write promote, abort, retry, pause, resume or rollback, a colon and the revision that it is for"
    )]
    Verb(String),
    #[error("it has more than {MOST} bytes")]
    Long,
    #[error("it must say for which revision: {0}:REVISION")]
    Revision(&'static str),
}

/// Reads a value.
///
/// # Errors
/// With words that say how it is written.
pub fn parse(value: &str) -> Result<(Verb, &str), Unclear> {
    if value.len() > MOST {
        return Err(Unclear::Long);
    }
    let mut parts = value.splitn(3, ':').map(str::trim);
    let verb = parts.next().unwrap_or_default();
    let Some(verb) = ALL.into_iter().find(|known| word(*known) == verb) else {
        return Err(Unclear::Verb(verb.to_owned()));
    };
    match parts.next() {
        // No revision has a longer name: names of objects and values of labels hold it.
        Some(revision) if !revision.is_empty() && revision.len() <= 63 => Ok((verb, revision)),
        Some(_) | None => Err(Unclear::Revision(word(verb))),
    }
}

/// A value that has not been handled yet.
#[must_use]
pub fn fresh(status: &CanaryStatus, verb: Verb, revision: &str) -> String {
    let plain = format!("{}:{revision}", word(verb));
    let used = |value: &String| {
        status.handled_actions.contains(value) || status.action.as_ref().is_some_and(|handled| handled.value == *value)
    };
    // So many more than are remembered that one is free.
    let noted = (2..REMEMBERED + 4).map(|note| format!("{plain}:{note}"));
    std::iter::once(plain.clone()).chain(noted).find(|value| !used(value)).unwrap_or(plain)
}

/// What to type.
#[must_use]
pub fn command(key: &CanaryKey, status: &CanaryStatus, verb: Verb, revision: &str) -> String {
    let CanaryKey { namespace, name } = key;
    let value = fresh(status, verb, revision);
    format!("kubectl annotate --overwrite -n {namespace} canary/{name} {}={value}", labels::ACTION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_a_verb_and_a_revision_and_perhaps_a_note() {
        for (value, understood) in [
            ("promote:abc", Ok((Verb::Promote, "abc"))),
            ("abort:abc:jane, ticket 12:30", Ok((Verb::Abort, "abc"))),
            (" retry : abc ", Ok((Verb::Retry, "abc"))),
            ("pause:abc:", Ok((Verb::Pause, "abc"))),
            ("resume:abc", Ok((Verb::Resume, "abc"))),
            ("rollback:abc", Ok((Verb::Rollback, "abc"))),
            ("promote", Err(Unclear::Revision("promote"))),
            ("promote:", Err(Unclear::Revision("promote"))),
            ("promote::now", Err(Unclear::Revision("promote"))),
            ("Promote:abc", Err(Unclear::Verb("Promote".into()))),
            ("restart:abc", Err(Unclear::Verb("restart".into()))),
        ] {
            assert_eq!(parse(value), understood, "{value}");
        }
        assert_eq!(parse(&format!("retry:abc:{}", "x".repeat(300))), Err(Unclear::Long));
        assert_eq!(parse(&format!("retry:{}", "x".repeat(64))), Err(Unclear::Revision("retry")));
    }

    #[test]
    fn what_is_suggested_has_not_been_said_before() {
        let mut status = CanaryStatus::default();
        let key = CanaryKey::new("shop", "cart");
        assert_eq!(
            command(&key, &status, Verb::Retry, "abc"),
            "kubectl annotate --overwrite -n shop canary/cart sluice.dev/action=retry:abc"
        );
        status.handled_actions = vec!["retry:abc".into(), "retry:abc:2".into()];
        assert_eq!(fresh(&status, Verb::Retry, "abc"), "retry:abc:3");
        status.handled_actions = (0..REMEMBERED).map(|note| format!("retry:abc:{note}")).collect();
        status.handled_actions.push("retry:abc".into());
        assert!(!status.handled_actions.contains(&fresh(&status, Verb::Retry, "abc")));
    }
}
