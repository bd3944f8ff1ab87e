//! The smallest group of equal devices that holds a model: what an operator asks before any device is there.

use super::{PlanError, Planned, Policy, parse_devices, plan};
use model::ModelSpec;
use model::storage::Storage;

/// Most devices that are tried.
const DEVICES_MAX: usize = 512;

/// Tries 1, 2, 4, 8, then whole hosts of eight, of `bytes` each; the first number with a plan, which serves at least one
/// sequence of the policy's length.
pub fn smallest(
    spec: &ModelSpec,
    storage: &Storage,
    bytes: u64,
    policy: &Policy,
) -> Result<(usize, Planned), PlanError> {
    let mut last = PlanError::NoDevices;
    for devices in [1, 2, 4].into_iter().chain((8..=DEVICES_MAX).step_by(8)) {
        let offers = parse_devices(&format!("{devices}x{bytes}B")).expect("a list that parses");
        match plan(spec, storage, &offers, policy, None) {
            Ok(planned) => return Ok((devices, planned)),
            Err(error @ PlanError::Memory { .. }) => last = error,
            // A number of devices that the model cannot be cut over.
            Err(PlanError::TooFew { .. } | PlanError::Spec(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(last)
}
