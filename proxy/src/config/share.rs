//! `FractionalPercent`: a part of all requests.

use sluice_xds::envoy::r#type::v3::{FractionalPercent, fractional_percent::DenominatorType};

use super::ConfigError;
use crate::snapshot::Share;

/// More than all is all, as for Envoy. `field` is where the message stands.
pub(super) fn parse(message: &FractionalPercent, field: &str) -> Result<Share, ConfigError> {
    let of_one = match DenominatorType::try_from(message.denominator) {
        Ok(DenominatorType::Hundred) => 10_000,
        Ok(DenominatorType::TenThousand) => 100,
        Ok(DenominatorType::Million) => 1,
        Err(_) => {
            let field = format!("{field}.denominator");
            return Err(ConfigError::unsupported(field, message.denominator, "HUNDRED, TEN_THOUSAND and MILLION"));
        }
    };
    Ok(Share(message.numerator.saturating_mul(of_one).min(Share::ALL.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fraction_is_the_same_part_in_whichever_terms() {
        let table = [(25, 0, 250_000), (2_500, 1, 250_000), (250_000, 2, 250_000), (0, 0, 0), (u32::MAX, 0, 1_000_000)];
        for (numerator, denominator, expected) in table {
            assert_eq!(parse(&FractionalPercent { numerator, denominator }, ""), Ok(Share(expected)));
        }
        assert!(parse(&FractionalPercent { numerator: 1, denominator: 3 }, "").is_err());
    }

    #[test]
    fn all_and_none_are_no_matter_of_chance() {
        assert!((0..10_000).all(|_| Share::ALL.draw() && !Share::NONE.draw()));
    }
}
