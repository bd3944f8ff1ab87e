//! The first bytes on a connection of the data plane: who asks, for what. Always the same length, so that a
//! stranger's bytes never decide how much is read or kept.

use model::plan::{Epoch, Plan};

/// Bytes of a [`Hello`].
pub const HELLO: usize = 64;

/// `conclave` in ASCII.
const MAGIC: u64 = u64::from_le_bytes(*b"conclave");

/// Grows with every change of what travels on the data plane.
const WIRE: u64 = 1;

/// What a communicator joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Tensor,
    Lane,
    Pipe,
}

/// A communicator of a plan: its kind and the rank that comes first in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CommunicatorId {
    pub kind: Kind,
    pub first: u32,
}

impl std::fmt::Display for CommunicatorId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            Kind::Tensor => "tensor",
            Kind::Lane => "lane",
            Kind::Pipe => "pipe",
        };
        write!(f, "{kind} group of rank {}", self.first)
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// To agree on shared memory, and then to notice the other process's death.
    Memory,
    /// The socket between two ranks.
    Pair,
}

/// Names one connection; `from` has dialled, `to` listens. Both are places in the communicator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub epoch: Epoch,
    pub communicator: CommunicatorId,
    pub purpose: Purpose,
    pub from: u32,
    pub to: u32,
}

/// A key, and the plan that the dialling process acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    pub key: Key,
    pub plan: u64,
}

/// One byte: what the listening process thinks of a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Welcome = 1,
    /// The epoch is over.
    Stale = 2,
    /// Same epoch, another plan.
    OtherPlan = 3,
    /// Another version of this protocol.
    OtherWire = 4,
    /// Too many connections wait already.
    Full = 5,
    /// It has not all of the files that it is asked to lend.
    Lacks = 6,
    /// It lends to as many as it may: to be asked again.
    Busy = 7,
}

impl Answer {
    pub fn decode(byte: u8) -> Option<Answer> {
        use Answer::*;
        [Welcome, Stale, OtherPlan, OtherWire, Full, Lacks, Busy].into_iter().find(|answer| *answer as u8 == byte)
    }
}

impl Hello {
    pub fn encode(&self) -> [u8; HELLO] {
        let kind = match self.key.communicator.kind {
            Kind::Tensor => 0,
            Kind::Lane => 1,
            Kind::Pipe => 2,
        };
        let purpose = match self.key.purpose {
            Purpose::Memory => 0,
            Purpose::Pair => 1,
        };
        let group = u64::from(self.key.communicator.first) | kind << 32 | purpose << 40;
        let words = [MAGIC, WIRE, self.key.epoch.0, self.plan, group, self.key.from.into(), self.key.to.into(), 0];
        let mut bytes = [0; HELLO];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// `None`: not ours, to be closed without a word.
    pub fn decode(bytes: &[u8; HELLO]) -> Option<Result<Hello, Answer>> {
        let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
        if word(0) != MAGIC {
            return None;
        }
        if word(1) != WIRE {
            return Some(Err(Answer::OtherWire));
        }
        let group = word(4);
        let kind = match group >> 32 & 0xff {
            0 => Kind::Tensor,
            1 => Kind::Lane,
            2 => Kind::Pipe,
            _ => return None,
        };
        let purpose = match group >> 40 {
            0 => Purpose::Memory,
            1 => Purpose::Pair,
            _ => return None,
        };
        let key = Key {
            epoch: Epoch(word(2)),
            communicator: CommunicatorId { kind, first: group as u32 },
            purpose,
            from: u32::try_from(word(5)).ok()?,
            to: u32::try_from(word(6)).ok()?,
        };
        Some(Ok(Hello { key, plan: word(3) }))
    }
}

/// A number that two processes share exactly if they act on the same plan (64-bit FNV-1a of its text).
pub fn fingerprint(plan: &Plan) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{plan:?}").into_bytes().into_iter().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_comes_back_from_its_bytes() {
        for (kind, purpose) in
            [(Kind::Tensor, Purpose::Pair), (Kind::Lane, Purpose::Memory), (Kind::Pipe, Purpose::Pair)]
        {
            let communicator = CommunicatorId { kind, first: 70_000 };
            let key = Key { epoch: Epoch(1 << 40), communicator, purpose, from: 3, to: 900 };
            let hello = Hello { key, plan: u64::MAX - 5 };
            assert_eq!(Hello::decode(&hello.encode()), Some(Ok(hello)));
        }
    }

    #[test]
    fn strangers_are_told_apart_from_other_versions() {
        let key = Key {
            epoch: Epoch(1),
            communicator: CommunicatorId { kind: Kind::Lane, first: 0 },
            purpose: Purpose::Pair,
            from: 1,
            to: 0,
        };
        let good = Hello { key, plan: 1 }.encode();
        for place in [0, 36, 37, 44, 52] {
            let mut bad = good;
            bad[place] = 9;
            assert_eq!(Hello::decode(&bad), None, "byte {place}");
        }
        let mut newer = good;
        newer[8] = 2;
        assert_eq!(Hello::decode(&newer), Some(Err(Answer::OtherWire)));
    }
}
