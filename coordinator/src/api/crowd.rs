//! Whether the queue was full a moment ago: then a request is refused before it is understood, so that a crowd costs little and
//! each of it is answered soon.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a full queue is taken to stay so. A queue of a thousand loses few places in it.
const MOMENT: Duration = Duration::from_millis(10);

/// Times are since any one moment.
#[derive(Default)]
pub struct Crowd {
    /// Microseconds; before it the queue counts as full.
    until: AtomicU64,
}

impl Crowd {
    /// The scheduler refused a request because its queue is full.
    pub fn refused(&self, now: Duration) {
        self.until.store((now + MOMENT).as_micros() as u64, Ordering::Relaxed);
    }

    pub fn is_there(&self, now: Duration) -> bool {
        (now.as_micros() as u64) < self.until.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_there_for_a_moment_after_each_refusal() {
        let (crowd, start) = (Crowd::default(), Duration::from_secs(5));
        assert!(!crowd.is_there(start));
        crowd.refused(start);
        assert!(crowd.is_there(start) && crowd.is_there(start + MOMENT / 2) && !crowd.is_there(start + MOMENT));
        crowd.refused(start + MOMENT / 2);
        assert!(crowd.is_there(start + MOMENT));
    }
}
