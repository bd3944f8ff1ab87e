//! A collective that first asks whether all members mean the same operation.

use super::{Abort, Collective};
use model::fault::{Fault, FaultKind};
use std::sync::Arc;

/// Costs one small gather more for each operation of all members; for tests and for the hunt of a divergence. All
/// members must be wrapped, or none. `send` and `receive` concern two ranks and are not checked.
pub struct Checked<C> {
    inner: C,
    calls: u64,
    seen: Vec<Vec<u8>>,
    diverged: Option<Fault>,
}

/// What a rank is about to call; sums must agree in length too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Sum(u64),
    Gather,
    Exchange,
}

impl Call {
    fn encode(self) -> [u8; 9] {
        let (kind, length) = match self {
            Call::Sum(length) => (0, length),
            Call::Gather => (1, 0),
            Call::Exchange => (2, 0),
        };
        let mut bytes = [kind; 9];
        bytes[1..].copy_from_slice(&length.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Call> {
        let (kind, length) = bytes.split_first()?;
        let length = u64::from_le_bytes(length.try_into().ok()?);
        match kind {
            0 => Some(Call::Sum(length)),
            1 => Some(Call::Gather),
            2 => Some(Call::Exchange),
            _ => None,
        }
    }
}

impl<C: Collective> Checked<C> {
    pub fn new(inner: C) -> Checked<C> {
        Checked { inner, calls: 0, seen: Vec::new(), diverged: None }
    }

    fn agree(&mut self, mine: Call) -> Result<(), Fault> {
        if let Some(fault) = &self.diverged {
            return Err(fault.clone());
        }
        self.calls += 1;
        self.inner.gather(&mine.encode(), &mut self.seen)?;
        for (rank, theirs) in self.seen.iter().enumerate() {
            let theirs = Call::decode(theirs);
            if theirs != Some(mine) {
                // Every member sees the same list, so all of them return this fault and nobody is left waiting.
                let text = format!(
                    "call {}: rank {} of {} is at {mine:?}, rank {rank} at {theirs:?}",
                    self.calls,
                    self.inner.rank(),
                    self.inner.size()
                );
                let fault = Fault::new(FaultKind::Diverged, text);
                self.diverged = Some(fault.clone());
                return Err(fault);
            }
        }
        Ok(())
    }
}

impl<C: Collective> Collective for Checked<C> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn sum(&mut self, values: &mut [f32]) -> Result<(), Fault> {
        self.agree(Call::Sum(values.len() as u64))?;
        self.inner.sum(values)
    }

    fn gather(&mut self, mine: &[u8], all: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        self.agree(Call::Gather)?;
        self.inner.gather(mine, all)
    }

    fn exchange(&mut self, parts: &[Vec<u8>], received: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        self.agree(Call::Exchange)?;
        self.inner.exchange(parts, received)
    }

    fn send(&mut self, to: usize, bytes: &[u8]) -> Result<(), Fault> {
        self.inner.send(to, bytes)
    }

    fn receive(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        self.inner.receive(from, bytes)
    }

    fn abort_handle(&self) -> Arc<dyn Abort> {
        self.inner.abort_handle()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::local;
    use crate::collective::suite::{Members, contract, each};

    fn make(size: usize) -> Members {
        let wrap = |member| Box::new(Checked::new(member)) as Box<dyn Collective>;
        local::members(size).unwrap().into_iter().map(wrap).collect()
    }

    contract!(make);

    #[test]
    fn members_at_different_operations_all_get_a_fault() {
        let faults = each(make(3), |mut member| {
            let mut list = Vec::new();
            member.gather(b"agreed", &mut list).unwrap();
            match member.rank() {
                0 => member.exchange(&[vec![], vec![], vec![]], &mut list),
                _ => member.gather(b"x", &mut list),
            }
            .unwrap_err()
        });
        assert!(faults.iter().all(|fault| fault.kind == FaultKind::Diverged), "{faults:?}");
    }

    #[test]
    fn sums_of_different_lengths_are_a_fault_with_both_lengths() {
        let faults = each(make(2), |mut member| {
            let length = 64 + member.rank();
            let first = member.sum(&mut vec![0.0; length]).unwrap_err();
            assert_eq!(member.sum(&mut [0.0; 3]).unwrap_err(), first, "it stays failed");
            first
        });
        for fault in faults {
            assert!(fault.text.contains("64") && fault.text.contains("65") && fault.text.contains("call 1"), "{fault}");
        }
    }
}
