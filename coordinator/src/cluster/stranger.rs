//! Who does not belong to the cluster, by what gave it away: each is refused, counted and said.

use crate::metrics;
use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines of one reason that are said in [`WINDOW`]: a worker that is told wrongly knocks three times a second for ever.
const LINES_MAX: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);

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

    /// Counts it, and says who it was and what was wrong, unless there are many.
    pub fn refused(self, who: impl Display, why: impl Display) {
        static VOICES: Mutex<[Voice; Stranger::ALL.len()]> = Mutex::new([Voice::NEW; Stranger::ALL.len()]);
        metrics::stranger(self);
        let kept = VOICES.lock().unwrap_or_else(PoisonError::into_inner)[self as usize].speak(Instant::now());
        match kept {
            None => {}
            Some(0) => tracing::warn!("refused {who} ({}): {why}", self.label()),
            Some(more) => tracing::warn!("refused {who} ({}, and {more} before it): {why}", self.label()),
        }
    }
}

/// What was said of one reason.
struct Voice {
    since: Option<Instant>,
    lines: u32,
    kept: u64,
}

impl Voice {
    const NEW: Voice = Voice { since: None, lines: 0, kept: 0 };

    /// Whether a line may be said now; then, how many were kept back before it.
    fn speak(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (self.since, self.lines) = (Some(now), 0);
        }
        if self.lines == LINES_MAX {
            self.kept += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_place_and_name() {
        for (place, stranger) in Stranger::ALL.into_iter().enumerate() {
            assert_eq!(stranger as usize, place);
            assert!(!Stranger::ALL[..place].iter().any(|other| other.label() == stranger.label()));
        }
    }

    #[test]
    fn a_crowd_is_told_in_few_lines_and_its_number() {
        let (mut voice, start) = (Voice::NEW, Instant::now());
        assert!((0..LINES_MAX).all(|_| voice.speak(start) == Some(0)));
        assert!((0..5).all(|_| voice.speak(start + WINDOW / 2).is_none()));
        assert_eq!((voice.speak(start + WINDOW), voice.speak(start + WINDOW)), (Some(5), Some(0)));
    }
}
