//! A host that a request is made to ask for.

use http::uri::Authority;

/// A host, or a host and a port.
#[must_use]
pub fn authority(text: &str) -> Option<Authority> {
    Authority::try_from(text).ok().filter(|authority| {
        let port = text.strip_prefix(authority.host());
        port.is_some_and(|port| port.is_empty() || authority.port_u16().is_some())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_a_port_that_is_one_or_none() {
        let table = [
            ("web", true),
            ("web.shop.svc:8080", true),
            ("[fd00::1]", true),
            ("[fd00::1]:65535", true),
            ("web:65536", false),
            ("web:", false),
            ("user@web", false),
            ("web shop", false),
            ("[1:2:3:4:5:6:7:8:9:a]", false),
            ("", false),
        ];
        for (text, is_host) in table {
            assert_eq!(authority(text).is_some(), is_host, "{text}");
        }
    }
}
