//! Who does not belong to the cluster, by what gave it away: each is refused, counted and said.

use crate::metrics;
use std::fmt::Display;

/// Why somebody is refused at the node plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stranger {
    /// It does not speak TLS where TLS is spoken, or breaks its rules.
    NoTls,
    NoCertificate,
    /// Another authority vouches for it.
    Authority,
    /// Its certificate is not valid now.
    Expired,
    /// Its certificate is wrong in another way.
    Certificate,
    /// It does not trust this coordinator, whose certificate has another name, authority or time.
    Distrust,
    /// It does not introduce itself in time, or goes before.
    Silent,
    Token,
    /// It speaks another version of the wire.
    Wire,
    Build,
    /// Its model's files or weights are others, so that it can't take part.
    Model,
}

impl Stranger {
    pub const ALL: [Stranger; 11] = [
        Stranger::NoTls,
        Stranger::NoCertificate,
        Stranger::Authority,
        Stranger::Expired,
        Stranger::Certificate,
        Stranger::Distrust,
        Stranger::Silent,
        Stranger::Token,
        Stranger::Wire,
        Stranger::Build,
        Stranger::Model,
    ];

    /// As metrics name it.
    pub fn label(self) -> &'static str {
        match self {
            Stranger::NoTls => "no_tls",
            Stranger::NoCertificate => "no_certificate",
            Stranger::Authority => "authority",
            Stranger::Expired => "expired",
            Stranger::Certificate => "certificate",
            Stranger::Distrust => "distrust",
            Stranger::Silent => "silent",
            Stranger::Token => "token",
            Stranger::Wire => "wire",
            Stranger::Build => "build",
            Stranger::Model => "model",
        }
    }

    /// Counts it, and says who it was and what was wrong.
    pub fn refused(self, who: impl Display, why: impl Display) {
        metrics::stranger(self);
        tracing::warn!("refused {who} ({}): {why}", self.label());
    }
}
