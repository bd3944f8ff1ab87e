//! The meshes worth trying, best first.
//!
//! Tensor ranks exchange sums in every layer, so they stay within a host. What is left becomes data lanes (with experts
//! spread over them) while each lane's share fits, and pipeline stages only when it does not: stages add latency, but
//! they need nothing to divide evenly. Of meshes that differ in lanes and slices alone the first one that fits is only a
//! proposal: [`super::copies`] decides between them.

use super::place::Seats;
use super::{PlanError, Policy};
use model::ModelSpec;
use model::cut;
use model::mesh::Mesh;
use std::cmp::Reverse;

/// A mesh worth trying.
pub(super) struct Candidate {
    pub mesh: Mesh,
    /// A tensor group has members on two hosts.
    crosses: bool,
}

impl Candidate {
    /// Whether only the number of lanes and slices tells them apart.
    pub fn rivals(&self, other: &Candidate) -> bool {
        let of = |c: &Candidate| (c.crosses, c.mesh.pipeline, c.mesh.ranks());
        of(self) == of(other) && self.mesh != other.mesh
    }
}

/// All meshes that the flags, the model's shape and the number of devices allow, in the order in which to try them.
pub(super) fn candidates(spec: &ModelSpec, seats: &Seats<'_>, policy: &Policy) -> Result<Vec<Candidate>, PlanError> {
    let devices = seats.len();
    let tensors = policy.tensor.map_or_else(|| cut::tensor_sizes(spec), |tensor| vec![tensor]);
    let mut axes = Vec::new();
    for tensor in tensors.into_iter().filter(|t| *t <= devices) {
        let within = seats.groups_within_hosts(tensor);
        let groups = devices / tensor;
        for pipeline in choices(policy.pipeline, groups.min(spec.layers.len())) {
            for data in lanes(policy.data, groups / pipeline) {
                if pipeline * data <= groups {
                    axes.push((pipeline * data > within, pipeline, data, tensor));
                }
            }
        }
    }
    axes.sort_by_key(|&(crosses, pipeline, data, tensor)| {
        (crosses, pipeline > 1, Reverse(pipeline * data * tensor), Reverse(tensor), pipeline)
    });
    let mut refused = None;
    let mut meshes = Vec::new();
    for (crosses, pipeline, data, tensor) in axes {
        match mesh(spec, policy, pipeline, data, tensor) {
            Ok(mesh) => meshes.push(Candidate { mesh, crosses }),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    if meshes.is_empty() {
        return Err(refused.unwrap_or_else(|| too_few(spec, policy, devices)));
    }
    Ok(meshes)
}

/// The flag alone, or everything up to `most`.
fn choices(flag: Option<usize>, most: usize) -> Vec<usize> {
    flag.map_or_else(|| (1..=most).collect(), |n| vec![n])
}

/// As many lanes as there is room for, or a power of two, which experts can be spread over.
fn lanes(flag: Option<usize>, most: usize) -> Vec<usize> {
    if let Some(n) = flag {
        return vec![n];
    }
    let mut lanes: Vec<usize> = (0..usize::BITS).map(|log| 1 << log).take_while(|n| *n <= most).collect();
    if most > 0 && !most.is_power_of_two() {
        lanes.push(most);
    }
    lanes
}

/// The mesh with its expert axis: as the flag says, else as many ways as ranks and experts allow, else not at all.
fn mesh(spec: &ModelSpec, policy: &Policy, pipeline: usize, data: usize, tensor: usize) -> Result<Mesh, PlanError> {
    let checked = |expert| {
        let mesh = Mesh::new(pipeline, data, tensor, expert)?;
        cut::check(spec, &mesh)?;
        Ok(mesh)
    };
    if let Some(expert) = policy.expert {
        return checked(expert);
    }
    // Over lanes single outputs come home, so only the slices' runs must be whole segments: the check sees to that.
    let most = if data > 1 { data * tensor } else { cut::expert_segments(spec).min(tensor) };
    let spread = (1..=most).rev().filter(|e| *e > 1 && e.is_multiple_of(data) && (data * tensor).is_multiple_of(*e));
    spread.map(checked).find(Result::is_ok).unwrap_or_else(|| checked(1))
}

/// Why the flags allow nothing: the cut itself, or the number of devices.
fn too_few(spec: &ModelSpec, policy: &Policy, has: usize) -> PlanError {
    let [pipeline, data, tensor] = [policy.pipeline, policy.data, policy.tensor].map(|flag| flag.unwrap_or(1));
    match mesh(spec, policy, pipeline, data, tensor) {
        Ok(mesh) => PlanError::TooFew { mesh, needs: mesh.ranks(), has },
        Err(error) => error,
    }
}
