//! Which device each rank sits on. Tensor groups stay within a host as long as there is room; after a change of
//! members, ranks stay where they were if the mesh does.

use super::{Device, Offer};
use model::mesh::{Mesh, RankId};
use model::plan::{Member, Plan};
use std::collections::BTreeMap;

/// All offered devices, ordered by host and worker so that the order of joining changes nothing.
pub(super) struct Seats<'a> {
    offers: Vec<&'a Offer>,
    /// Devices of each host, in the order of `offers`.
    hosts: Vec<Vec<Seat>>,
}

/// A device: which offer's, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seat {
    offer: usize,
    device: usize,
}

/// A device for each rank.
pub(super) struct Seated {
    /// Ranks of each offer, ascending; the i-th sits on device i.
    ranks: Vec<Vec<RankId>>,
    /// Bytes that each rank may use.
    pub memory: Vec<u64>,
}

impl<'a> Seats<'a> {
    pub fn new(members: &'a [Offer]) -> Seats<'a> {
        let mut offers: Vec<&Offer> = members.iter().collect();
        offers.sort_by(|a, b| (&a.host, &a.worker).cmp(&(&b.host, &b.worker)));
        let mut hosts: BTreeMap<&str, Vec<Seat>> = BTreeMap::new();
        for (index, offer) in offers.iter().enumerate() {
            let seats = (0..offer.devices.len()).map(|device| Seat { offer: index, device });
            hosts.entry(&offer.host).or_default().extend(seats);
        }
        Seats { hosts: hosts.into_values().collect(), offers }
    }

    pub fn len(&self) -> usize {
        self.hosts.iter().map(Vec::len).sum()
    }

    /// Tensor groups of `tensor` ranks that fit without one crossing hosts.
    pub fn groups_within_hosts(&self, tensor: usize) -> usize {
        self.hosts.iter().map(|seats| seats.len() / tensor).sum()
    }

    /// Seats every rank of `mesh`; `None` if there are too few devices.
    pub fn seat(&self, mesh: &Mesh, previous: Option<&Plan>) -> Option<Seated> {
        let kept = previous.filter(|p| p.mesh == *mesh).and_then(|p| self.keep(p));
        let seats = match kept {
            Some(seats) => seats,
            None => self.fresh(mesh)?,
        };
        let mut ranks = vec![Vec::new(); self.offers.len()];
        for (rank, seat) in mesh.all().zip(&seats) {
            ranks[seat.offer].push(rank);
        }
        let mut memory = vec![0; mesh.ranks()];
        for (offer, ranks) in self.offers.iter().zip(&ranks) {
            for (rank, device) in ranks.iter().zip(&offer.devices) {
                memory[rank.0 as usize] = device.memory_bytes;
            }
        }
        Some(Seated { ranks, memory })
    }

    /// Group after group, each within one host if all can be.
    fn fresh(&self, mesh: &Mesh) -> Option<Vec<Seat>> {
        if mesh.ranks() > self.len() {
            return None;
        }
        let groups = mesh.pipeline * mesh.data;
        let seats: Vec<Seat> = if self.groups_within_hosts(mesh.tensor) >= groups {
            self.hosts.iter().flat_map(|host| host.chunks_exact(mesh.tensor).flatten().copied()).collect()
        } else {
            self.hosts.iter().flatten().copied().collect()
        };
        Some(seats[..mesh.ranks()].to_vec())
    }

    /// The previous seats of workers that are still there, the others filled with free devices, near ones first.
    /// `None` if they do not suffice.
    fn keep(&self, previous: &Plan) -> Option<Vec<Seat>> {
        let mesh = &previous.mesh;
        let mut seats: Vec<Option<Seat>> = vec![None; mesh.ranks()];
        let mut free: Vec<Vec<Seat>> = self.hosts.clone();
        for member in &previous.members {
            let Some(offer) = self.offers.iter().position(|o| o.worker == member.worker) else { continue };
            if self.offers[offer].devices.len() < member.ranks.len() {
                continue;
            }
            for (device, rank) in member.ranks.iter().enumerate() {
                let seat = Seat { offer, device };
                seats[rank.0 as usize] = Some(seat);
                free.iter_mut().for_each(|host| host.retain(|s| *s != seat));
            }
        }
        for rank in mesh.all() {
            if seats[rank.0 as usize].is_some() {
                continue;
            }
            let near = mesh.tensor_group(rank).into_iter().find_map(|peer| seats[peer.0 as usize]);
            let near = near.map(|seat| &self.offers[seat.offer].host);
            let here = |host: &Vec<Seat>| host.first().is_some_and(|s| Some(&self.offers[s.offer].host) == near);
            // Without a neighbour, the host with the most room leaves the most together.
            let host = free.iter().position(here).or_else(|| (0..free.len()).max_by_key(|h| free[*h].len()))?;
            if free[host].is_empty() {
                return None;
            }
            seats[rank.0 as usize] = Some(free[host].remove(0));
        }
        seats.into_iter().collect()
    }

    /// The members of a plan: offers that hold a rank.
    pub fn members(&self, seated: &Seated) -> Vec<Member> {
        let used = self.offers.iter().zip(&seated.ranks).filter(|(_, ranks)| !ranks.is_empty());
        let threads = |devices: &[Device]| devices.iter().map(|d| d.threads).min().unwrap_or(1).max(1);
        used.map(|(offer, ranks)| Member {
            worker: offer.worker.clone(),
            host: offer.host.clone(),
            data_address: offer.data_address.clone(),
            ranks: ranks.clone(),
            threads: threads(&offer.devices[..ranks.len()]),
        })
        .collect()
    }
}
