//! Fills in the variables of a MetricTemplate or an inline query.
//!
//! Flagger's are Go templates with functions (`{{ namespace }}`, `{{ variables.zone }}`); written so, they are the same in
//! minijinja. An unknown variable is an error, as in Flagger: a selector with an empty value would judge the wrong pods.

use std::collections::BTreeMap;

use minijinja::{Environment, ErrorKind, UndefinedBehavior, context};

/// What a template may cost to fill in, in minijinja's instructions: one that loops ends with an error.
const FUEL: u64 = 20_000;
/// Longest query, as in the CRD.
const MAX_QUERY: usize = 8192;

/// Values of a template's variables.
#[derive(Clone, Debug, PartialEq)]
pub struct Variables<'a> {
    pub name: &'a str,
    pub namespace: &'a str,
    pub target: &'a str,
    pub service: &'a str,
    /// As it stands in the gate's `interval`.
    pub interval: &'a str,
    pub primary: &'a str,
    pub canary: &'a str,
    /// The canary gets copies of requests in this step.
    pub mirrored: bool,
    pub variables: &'a BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TemplateError {
    #[error(
        "the query uses a variable that does not exist ({0}): there are name, namespace, target, service, ingress, route, interval, \
         primary, canary, revision, mirrored and variables.KEY with the keys of templateVariables"
    )]
    Undefined(String),
    #[error("the query's template is wrong: {0}")]
    Syntax(String),
    #[error("the query has more than 8192 characters once its variables are filled in")]
    TooLong,
}

/// The query as it is sent.
///
/// # Errors
/// On an unknown variable or wrong syntax.
pub fn render(query: &str, with: &Variables<'_>) -> Result<String, TemplateError> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_fuel(Some(FUEL));
    let text = environment
        .render_str(
            query,
            context! {
                name => with.name,
                namespace => with.namespace,
                target => with.target,
                service => with.service,
                // Flagger's names of things that a fleet has no need of; empty there too unless their refs are set.
                ingress => "",
                route => "",
                interval => with.interval,
                primary => with.primary,
                canary => with.canary,
                revision => with.canary,
                mirrored => with.mirrored,
                variables => with.variables,
            },
        )
        .map_err(|error| {
            let line = super::prometheus::shorten(&error.to_string());
            if error.kind() == ErrorKind::UndefinedError {
                TemplateError::Undefined(line)
            } else {
                TemplateError::Syntax(line)
            }
        })?;
    let text = text.trim();
    if text.len() > MAX_QUERY {
        return Err(TemplateError::TooLong);
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn rendered(query: &str) -> Result<String, TemplateError> {
        let variables = BTreeMap::from([("zone".to_owned(), "eu".to_owned()), ("max-age".to_owned(), "5".to_owned())]);
        render(
            query,
            &Variables {
                name: "cart",
                namespace: "shop",
                target: "cart-app",
                service: "cart-svc",
                interval: "1m30s",
                primary: "aaaa",
                canary: "bbbb",
                mirrored: false,
                variables: &variables,
            },
        )
    }

    #[test]
    fn variables_are_filled_in_as_in_flagger() {
        for (query, expected) in [
            (r#"up{ns="{{ namespace }}",n="{{ name }}"}"#, r#"up{ns="shop",n="cart"}"#),
            ("{{target}} {{- service }}", "cart-appcart-svc"),
            ("rate(x[{{ interval }}])", "rate(x[1m30s])"),
            ("{{ variables.zone }}", "eu"),
            (r#"{{ variables["max-age"] }}"#, "5"),
            (r#"a{i="{{ ingress }}",r="{{ route }}"}"#, r#"a{i="",r=""}"#),
            ("{{ primary }}/{{ canary }}/{{ revision }}", "aaaa/bbbb/bbbb"),
            (r#"x{pod=~"{{ target }}-{{ canary }}-.+"}"#, r#"x{pod=~"cart-app-bbbb-.+"}"#),
            (r#"{{ "copies" if mirrored else "requests" }}_total"#, "requests_total"),
            // PromQL's own braces, and no HTML escaping of quotes and comparisons.
            (r#"sum(x{a!="b"}) > 5 and {__name__="y"}"#, r#"sum(x{a!="b"}) > 5 and {__name__="y"}"#),
            ("\n  up  \n", "up"),
        ] {
            assert_eq!(rendered(query).unwrap(), expected, "{query}");
        }
    }

    #[test]
    fn what_cannot_be_filled_in_is_an_error_that_names_the_choices() {
        for query in ["{{ pod }}", "{{ variables.nosuch }}", "{{ namespace.x.y }}"] {
            let error = rendered(query).unwrap_err();
            assert!(matches!(error, TemplateError::Undefined(_)), "{query}: {error:?}");
            assert!(error.to_string().contains("variables.KEY"), "{error}");
        }
        for query in ["{{ namespace", "{{ 1 + }}", "{{ nosuch() }}"] {
            assert!(matches!(rendered(query).unwrap_err(), TemplateError::Syntax(_)), "{query}");
        }
    }

    #[test]
    fn a_template_that_loops_ends_with_an_error() {
        let query = "{% for a in range(10000) %}{% for b in range(10000) %}x{% endfor %}{% endfor %}";
        assert!(matches!(rendered(query).unwrap_err(), TemplateError::Syntax(_)));
        assert_eq!(rendered(&format!("{}{}", "x".repeat(8190), "{{ name }}")).unwrap_err(), TemplateError::TooLong);
    }
}
