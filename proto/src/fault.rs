//! Fault kinds on the wire: recovery matches on them, so a kind must survive the trip.

use crate::cluster::v1 as wire;
use model::fault::{Fault, FaultKind};
use model::plan::Epoch;

const KINDS: [(FaultKind, wire::FaultKind); 10] = [
    (FaultKind::StaleEpoch, wire::FaultKind::StaleEpoch),
    (FaultKind::RankLost, wire::FaultKind::RankLost),
    (FaultKind::Aborted, wire::FaultKind::Aborted),
    (FaultKind::Timeout, wire::FaultKind::Timeout),
    (FaultKind::OutOfMemory, wire::FaultKind::OutOfMemory),
    (FaultKind::DeviceLost, wire::FaultKind::DeviceLost),
    (FaultKind::BadCheckpoint, wire::FaultKind::BadCheckpoint),
    (FaultKind::Incompatible, wire::FaultKind::Incompatible),
    (FaultKind::Diverged, wire::FaultKind::Diverged),
    (FaultKind::Internal, wire::FaultKind::Internal),
];

/// A fault of `epoch` (0 for none) as it travels.
pub fn to_wire(fault: &Fault, epoch: Epoch) -> wire::Fault {
    let kind = KINDS.iter().find(|(k, _)| *k == fault.kind).expect("every kind is listed").1;
    wire::Fault { kind: kind.into(), text: fault.text.clone(), epoch: epoch.0 }
}

/// The fault that arrived; an unknown kind (a newer peer's) is an internal one.
pub fn from_wire(fault: wire::Fault) -> Fault {
    let kind = KINDS.iter().find(|(_, w)| i32::from(*w) == fault.kind).map_or(FaultKind::Internal, |(k, _)| *k);
    Fault::new(kind, fault.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for (kind, _) in KINDS {
            let fault = Fault::new(kind, "rank 3 of 8");
            assert_eq!(from_wire(to_wire(&fault, Epoch(7))), fault);
        }
    }
}
