//! Keeps what Sluice adds to users' objects: the fleet's key in the selector of a taken-over Service, and the target's rest
//! at 0 replicas. Git tools apply both away; between their write and the repair by `delivery`, requests would go around the
//! fleet and Pods that nobody judged would start.
//!
//! The same decision in two forms, of which one holds at a time:
//!
//! - policies that the API server evaluates itself ([`objects`]), keyed by name with the Canary as parameter. Nothing of ours
//!   need run for them;
//! - where it serves no `MutatingAdmissionPolicy`: a webhook ([`Webhook`]), which every replica answers from its cache
//!   ([`decision`]), leading or not, for labelled objects only.
//!
//! Behind both, `delivery` watches and repairs. Only the leader writes the configuration, and looks whether the API server reaches
//! the webhook ([`Keeper`]).

pub mod decision;
mod keeper;
pub mod objects;
mod reach;
mod server;
mod uninstall;

use std::fmt;

use clap::ValueEnum;

pub use keeper::{Keeper, Report};
pub use reach::Pace;
pub use server::{Webhook, WebhookError};
pub use uninstall::{Uninstall, UninstallError};

/// What shall protect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protection {
    /// Policies where the API server serves them, the webhook elsewhere.
    Auto,
    /// Policies only.
    Policy,
    /// The webhook, also where policies are served.
    Webhook,
    /// Nothing but watch and repair.
    None,
}

impl Protection {
    /// Whether the webhook may be needed, so that every replica has to answer it.
    #[must_use]
    pub fn may_be_webhook(self) -> bool {
        match self {
            Self::Auto | Self::Webhook => true,
            Self::Policy | Self::None => false,
        }
    }
}

/// What protects in fact.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effective {
    /// `MutatingAdmissionPolicy` of this API version.
    Policy(String),
    Webhook,
    /// `delivery` alone, which comes some ten milliseconds late.
    Repair,
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Policy(_) => "policy",
            Self::Webhook => "webhook",
            Self::Repair => "repair",
        })
    }
}
