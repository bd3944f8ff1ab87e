//! The communicator of one member.

use super::{Abort, Collective, reset};
use model::fault::{Fault, FaultKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A rank alone: every operation is over at once.
#[derive(Default)]
pub struct Solo {
    aborted: Arc<Flag>,
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Abort for Flag {
    fn abort(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Solo {
    fn check(&self) -> Result<(), Fault> {
        if self.aborted.0.load(Ordering::Acquire) {
            return Err(Fault::new(FaultKind::Aborted, "communicator of 1 rank was aborted"));
        }
        Ok(())
    }
}

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&mut self, _values: &mut [f32]) -> Result<(), Fault> {
        self.check()
    }

    fn gather(&mut self, mine: &[u8], all: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        reset(all, 1);
        all[0].extend_from_slice(mine);
        self.check()
    }

    fn exchange(&mut self, parts: &[Vec<u8>], received: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        assert_eq!(parts.len(), 1, "one part a member");
        reset(received, 1);
        received[0].extend_from_slice(&parts[0]);
        self.check()
    }

    fn send(&mut self, to: usize, _bytes: &[u8]) -> Result<(), Fault> {
        Err(Fault::new(FaultKind::Internal, format!("a lone rank sends to rank {to}")))
    }

    fn receive(&mut self, from: usize, _bytes: &mut Vec<u8>) -> Result<(), Fault> {
        Err(Fault::new(FaultKind::Internal, format!("a lone rank receives from rank {from}")))
    }

    fn abort_handle(&self) -> Arc<dyn Abort> {
        self.aborted.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_rank_gets_its_own_back_until_aborted() {
        let mut solo = Solo::default();
        let (mut values, mut list) = ([1.5, -2.0], vec![vec![1]; 3]);
        solo.sum(&mut values).unwrap();
        assert_eq!(values, [1.5, -2.0]);
        solo.gather(b"mine", &mut list).unwrap();
        assert_eq!(list, [b"mine"]);
        solo.exchange(&[b"part".to_vec()], &mut list).unwrap();
        assert_eq!(list, [b"part"]);
        assert!(solo.send(1, b"").is_err() && solo.receive(1, &mut Vec::new()).is_err());
        solo.abort_handle().abort();
        assert_eq!(solo.sum(&mut values).unwrap_err().kind, FaultKind::Aborted);
    }
}
