//! The data plane of a worker process: from a plan to the communicators of its ranks.
//!
//! All processes set up the communicators that concern them in one order (kind, then first rank). Each set-up waits
//! only for members of that communicator, so no two processes wait for each other.

use super::checked::Checked;
use super::credentials::Credentials;
use super::device::Devices;
use super::door::Door;
use super::hello::{Answer, CommunicatorId, Hello, Key, Kind, Purpose, fingerprint};
use super::link::Link;
use super::memfd::{self, Offer, Origin};
use super::refused::Refused;
use super::shared::{Seats, Shared};
use super::sockets::{lost, read_exact};
use super::solo::Solo;
use super::tcp::Tcp;
use super::wait::spin_for;
use super::watch::{Lifeline, Watch};
use super::weights::give::Open;
use super::weights::take::Peers;
use super::{Abort, Collective, local};
use crate::load::remote::Lender;
use model::fault::{Fault, FaultKind};
use model::mesh::RankId;
use model::plan::{Epoch, Member, Plan, WorkerId};
use proto::tls::Tls;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Where peers' data arrives, and what was built over it.
pub struct DataPlane {
    door: Door,
    credentials: Option<Arc<Credentials>>,
    built: Mutex<Vec<(Epoch, Weak<dyn Abort>)>>,
    flow: Arc<AtomicU64>,
}

/// One rank's communicators. Those of one member are trivial.
pub struct Communicators {
    /// [`model::Mesh::tensor_group`]: matrices' partial sums.
    pub tensor: Box<dyn Collective>,
    /// [`model::Mesh::lane_group`]: the exchange for experts.
    pub lane: Box<dyn Collective>,
    /// [`model::Mesh::pipe_group`]: activations between stages.
    pub pipe: Box<dyn Collective>,
    /// Between the devices of the same members, where these reach each other.
    pub devices: Devices,
}

/// How to connect.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// For all communicators together.
    pub deadline: Duration,
    /// Wraps each in [`Checked`]: the same on all workers.
    pub checked: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { deadline: Duration::from_secs(10), checked: cfg!(debug_assertions) }
    }
}

impl DataPlane {
    /// Listens for peers at `address` (`ip:port`, port 0 for any). With `tls` every connection, of this host's processes
    /// too, is encrypted and both ends show certificates; what shared memory carries crosses no socket.
    pub fn bind(address: &str, tls: Option<Tls>) -> Result<DataPlane, Fault> {
        let credentials = tls.map(Credentials::read).transpose()?.map(Arc::new);
        let door = Door::bind(address, credentials.clone())?;
        Ok(DataPlane { door, credentials, built: Mutex::default(), flow: Arc::default() })
    }

    /// Moves with every byte that ranks of this process exchange over sockets.
    pub fn flow(&self) -> u64 {
        self.flow.load(Ordering::Relaxed)
    }

    /// Who was turned away since the start.
    pub fn refused(&self) -> &Arc<Refused> {
        self.door.refused()
    }

    /// Where peers reach this process, to be told in [`Member::data_address`].
    pub fn address(&self) -> SocketAddr {
        self.door.address()
    }

    /// Builds the communicators of `me`'s ranks, in the order in which the plan names them. Every worker of the plan
    /// does so at about the same time. Epochs before the plan's are refused from now on. Certificates are read anew.
    pub fn connect(
        &self,
        plan: &Plan,
        me: &WorkerId,
        options: &Options,
    ) -> Result<Vec<(RankId, Communicators)>, Fault> {
        let member = plan.members.iter().find(|member| member.worker == *me).ok_or_else(|| {
            Fault::new(FaultKind::Incompatible, format!("worker {} has no part in plan {}", me.0, plan.epoch.0))
        })?;
        self.door.raise(plan.epoch);
        let host_ranks = plan.members.iter().filter(|other| other.host == member.host).map(|m| m.ranks.len()).sum();
        let connecting = Connecting {
            plane: self,
            plan,
            me: member,
            fingerprint: fingerprint(plan),
            deadline: Instant::now() + options.deadline,
            spin: spin_for(host_ranks),
        };
        let mut built: BTreeMap<(RankId, Kind), Box<dyn Collective>> = BTreeMap::new();
        for (id, group) in connecting.groups() {
            let group = Group { id, ranks: &group, holders: connecting.holders(&group)? };
            for (place, communicator) in connecting.build(&group)? {
                self.remember(plan.epoch, &communicator.abort_handle());
                let communicator = if options.checked { Box::new(Checked::new(communicator)) } else { communicator };
                built.insert((group.ranks[place], id.kind), communicator);
            }
        }
        // An abort that came while the last ones were built must not be missed.
        connecting.cancelled().map_or(Ok(()), Err)?;
        let mut take = |rank, kind| built.remove(&(rank, kind)).expect("every rank is in a group of every kind");
        let mut communicators = |rank| Communicators {
            tensor: take(rank, Kind::Tensor),
            lane: take(rank, Kind::Lane),
            pipe: take(rank, Kind::Pipe),
            devices: Devices::default(),
        };
        Ok(member.ranks.iter().map(|rank| (*rank, communicators(*rank))).collect())
    }

    /// Lends the files that `open` finds to workers that need the model with this identity and know the cluster's token.
    pub fn lend(&self, identity: &[u8], token: &str, open: Open) -> Result<(), Fault> {
        self.door.giver().lend(whole(identity)?, token, open);
        Ok(())
    }

    /// The files of the model with this identity, lent by workers at `addresses`, until `epoch` is over.
    pub fn borrow(
        &self,
        addresses: &[String],
        (identity, token): (&[u8], &str),
        epoch: Epoch,
    ) -> Result<Arc<dyn Lender>, Fault> {
        let (identity, fence) = (whole(identity)?, self.door.fence(epoch));
        Ok(Arc::new(Peers::find(addresses, (&identity, token), epoch, self.credentials.clone(), fence)?))
    }

    /// Ends everything of `epoch` and before: communicators, connections that wait, a `connect` under way.
    pub fn abort_all(&self, epoch: Epoch) {
        self.door.raise(Epoch(epoch.0 + 1));
        let mut ended = Vec::new();
        self.lock().retain(|(built, handle)| {
            let over = *built <= epoch;
            if over {
                ended.extend(handle.upgrade());
            }
            !over
        });
        ended.iter().for_each(|handle| handle.abort());
    }

    /// What is to end with `epoch`, at the latest; whoever holds the rank holds it.
    pub fn remember(&self, epoch: Epoch, handle: &Arc<dyn Abort>) {
        let mut built = self.lock();
        built.retain(|(_, handle)| handle.strong_count() > 0);
        built.push((epoch, Arc::downgrade(handle)));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Epoch, Weak<dyn Abort>)>> {
        self.built.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A model's identity as it travels.
fn whole(identity: &[u8]) -> Result<[u8; 32], Fault> {
    let wrong = |_| Fault::new(FaultKind::Incompatible, format!("{} bytes identify no model", identity.len()));
    identity.try_into().map_err(wrong)
}

/// A communicator to build: who is in it, and which worker holds each place.
struct Group<'a> {
    id: CommunicatorId,
    ranks: &'a [RankId],
    holders: Vec<&'a Member>,
}

/// This process's communicators by place.
type Built = Vec<(usize, Box<dyn Collective>)>;

/// A communicator's memory, and how this process hears of the others' deaths.
type Mapped = (Arc<Seats>, Vec<Lifeline>);

struct Connecting<'a> {
    plane: &'a DataPlane,
    plan: &'a Plan,
    me: &'a Member,
    fingerprint: u64,
    deadline: Instant,
    spin: u32,
}

impl<'a> Connecting<'a> {
    /// Every communicator with a rank of this process, in the order that all processes keep.
    fn groups(&self) -> BTreeMap<CommunicatorId, Vec<RankId>> {
        let mesh = &self.plan.mesh;
        let of = |rank: RankId| {
            [
                (Kind::Tensor, mesh.tensor_group(rank)),
                (Kind::Lane, mesh.lane_group(rank)),
                (Kind::Pipe, mesh.pipe_group(rank)),
            ]
        };
        let named = |(kind, ranks): (Kind, Vec<RankId>)| (CommunicatorId { kind, first: ranks[0].0 }, ranks);
        self.me.ranks.iter().flat_map(|rank| of(*rank)).map(named).collect()
    }

    fn holders(&self, ranks: &[RankId]) -> Result<Vec<&'a Member>, Fault> {
        let holder = |rank: &RankId| {
            let member = self.plan.members.iter().find(|member| member.ranks.contains(rank));
            member.ok_or_else(|| {
                let text = format!("plan {} gives rank {} to no worker", self.plan.epoch.0, rank.0);
                Fault::new(FaultKind::Incompatible, text)
            })
        };
        ranks.iter().map(holder).collect()
    }

    fn build(&self, group: &Group<'_>) -> Result<Built, Fault> {
        if group.ranks.len() == 1 {
            return Ok(vec![(0, Box::new(Solo::default()))]);
        }
        if group.holders.iter().all(|holder| holder.worker == self.me.worker) {
            let members = local::members_spinning(group.ranks.len(), self.spin)?;
            let boxed = |(place, member)| (place, Box::new(member) as Box<dyn Collective>);
            return Ok(members.into_iter().enumerate().map(boxed).collect());
        }
        if group.holders.iter().all(|holder| holder.host == self.me.host)
            && let Some(built) = self.share_memory(group)?
        {
            return Ok(built);
        }
        self.mesh_of_sockets(group)
    }

    fn mine<'g>(&'g self, group: &'g Group<'_>) -> impl Iterator<Item = usize> + 'g {
        (0..group.ranks.len()).filter(|place| group.holders[*place].worker == self.me.worker)
    }

    /// The processes of a group by their first place, the creator's before all.
    fn processes(group: &Group<'_>) -> Vec<usize> {
        let mut seen = BTreeSet::new();
        (0..group.ranks.len()).filter(|place| seen.insert(&group.holders[*place].worker)).collect()
    }

    fn places(group: &Group<'_>, process: usize) -> Vec<usize> {
        let worker = &group.holders[process].worker;
        (0..group.ranks.len()).filter(|place| group.holders[*place].worker == *worker).collect()
    }

    /// `None` where some process cannot map the memory, for instance from another container: all of them hear so.
    fn share_memory(&self, group: &Group<'_>) -> Result<Option<Built>, Fault> {
        let shared = if group.holders[0].worker == self.me.worker {
            self.offer_memory(group)?
        } else {
            self.take_memory(group)?
        };
        let Some((seats, lifelines)) = shared else { return Ok(None) };
        let watch = Arc::new(Watch::start(seats.clone(), lifelines)?);
        let member = |place| {
            let member = Shared::new(seats.clone(), place, self.spin).keeping(watch.clone());
            (place, Box::new(member) as Box<dyn Collective>)
        };
        Ok(Some(self.mine(group).map(member).collect()))
    }

    fn offer_memory(&self, group: &Group<'_>) -> Result<Option<Mapped>, Fault> {
        let mark = self.fingerprint ^ (u64::from(group.id.first) << 8 | group.id.kind as u64) ^ random();
        // No memory here is no end: zeros are an offer that everyone declines.
        let origin = Origin::new(group.ranks.len(), mark).ok();
        let offer = origin.as_ref().map_or(Offer { process: 0, descriptor: 0, mark: 0 }, Origin::offer);
        let mut links = Vec::new();
        for process in Connecting::processes(group).into_iter().skip(1) {
            let mut link = self.claim(group, Purpose::Memory, process, 0)?;
            self.say(group, process, &mut link, &encode(&offer))?;
            links.push((process, link));
        }
        let mut all = origin.is_some();
        for (process, link) in &mut links {
            all &= self.hear::<1>(group, *process, link)? == [1];
        }
        for (process, link) in &mut links {
            self.say(group, *process, link, &[u8::from(all)])?;
        }
        let lifeline = |(process, link)| Connecting::lifeline(group, process, link);
        let lifelines = links.into_iter().map(lifeline).collect();
        Ok(origin.filter(|_| all).map(|origin| (origin.seats().clone(), lifelines)))
    }

    fn take_memory(&self, group: &Group<'_>) -> Result<Option<Mapped>, Fault> {
        let first = self.mine(group).next().expect("a group of this process");
        let mut link = self.dial(group, Purpose::Memory, first, 0)?;
        self.welcomed(group, 0, &mut link)?;
        let offer = decode(&self.hear::<16>(group, 0, &mut link)?);
        let seats = memfd::open(&offer, group.ranks.len()).ok();
        self.say(group, 0, &mut link, &[u8::from(seats.is_some())])?;
        let all = self.hear::<1>(group, 0, &mut link)? == [1];
        let lifeline = Connecting::lifeline(group, 0, link);
        Ok(seats.filter(|_| all).map(|seats| (seats, vec![lifeline])))
    }

    /// Only the end of a lifeline is ever heard, so what guarded its first words is of no more use.
    fn lifeline(group: &Group<'_>, process: usize, link: Link) -> Lifeline {
        Lifeline { stream: link.socket, seats: Connecting::places(group, process) }
    }

    /// Later places dial earlier ones. All dial before anyone waits.
    fn mesh_of_sockets(&self, group: &Group<'_>) -> Result<Built, Fault> {
        let size = group.ranks.len();
        let mut links: BTreeMap<(usize, usize), Link> = BTreeMap::new();
        for me in self.mine(group) {
            for peer in 0..me {
                links.insert((me, peer), self.dial(group, Purpose::Pair, me, peer)?);
            }
        }
        for me in self.mine(group) {
            for peer in me + 1..size {
                links.insert((me, peer), self.claim(group, Purpose::Pair, peer, me)?);
            }
        }
        let mut built: Built = Vec::new();
        for me in self.mine(group) {
            for peer in 0..me {
                self.welcomed(group, peer, links.get_mut(&(me, peer)).expect("dialled above"))?;
            }
            let mine = (0..size).map(|peer| links.remove(&(me, peer))).collect();
            built.push((me, Box::new(Tcp::new(me, mine, self.spin)?.moving(self.plane.flow.clone()))));
        }
        Ok(built)
    }

    fn cancelled(&self) -> Option<Fault> {
        self.plane.door.ended(self.plan.epoch)
    }

    fn key(&self, group: &Group<'_>, purpose: Purpose, from: usize, to: usize) -> Key {
        Key { epoch: self.plan.epoch, communicator: group.id, purpose, from: from as u32, to: to as u32 }
    }

    /// For texts of faults: which peer of which communicator.
    fn who(&self, group: &Group<'_>, place: usize) -> String {
        let (rank, holder) = (group.ranks[place], group.holders[place]);
        format!(
            "{}, epoch {}: rank {} of worker {} at {}",
            group.id, self.plan.epoch.0, rank.0, holder.worker.0, holder.data_address
        )
    }

    fn lost(&self, group: &Group<'_>, place: usize, error: &std::io::Error) -> Fault {
        lost(&self.who(group, place), error)
    }

    fn dial(&self, group: &Group<'_>, purpose: Purpose, from: usize, to: usize) -> Result<Link, Fault> {
        self.cancelled().map_or(Ok(()), Err)?;
        let address = &group.holders[to].data_address;
        let reach = || -> std::io::Result<Link> {
            let socket = self.connection(address)?;
            let hello = Hello { key: self.key(group, purpose, from, to), plan: self.fingerprint }.encode();
            socket.set_nodelay(true)?;
            let credentials = self.plane.credentials.as_deref();
            Link::dialled(socket, credentials, &hello, self.deadline, || self.cancelled().is_some())
        };
        reach().map_err(|error| self.cancelled().unwrap_or_else(|| self.lost(group, to, &error)))
    }

    /// To the first that answers of all the addresses that `name` stands for.
    fn connection(&self, name: &str) -> std::io::Result<TcpStream> {
        let mut outcome = Err(std::io::Error::other("no such address"));
        for address in name.to_socket_addrs()? {
            let left = self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            outcome = TcpStream::connect_timeout(&address, left);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    fn claim(&self, group: &Group<'_>, purpose: Purpose, from: usize, to: usize) -> Result<Link, Fault> {
        let key = self.key(group, purpose, from, to);
        self.plane.door.claim(&key, self.fingerprint, self.deadline, &self.who(group, from))
    }

    fn welcomed(&self, group: &Group<'_>, place: usize, link: &mut Link) -> Result<(), Fault> {
        let [byte] = self.hear::<1>(group, place, link)?;
        let (kind, what) = match Answer::decode(byte) {
            Some(Answer::Welcome) => return Ok(()),
            Some(Answer::Stale) => (FaultKind::StaleEpoch, "has a newer epoch"),
            Some(Answer::OtherPlan) => (FaultKind::Incompatible, "acts on another plan of this epoch"),
            Some(Answer::OtherWire) => (FaultKind::Incompatible, "speaks another version of the data plane"),
            Some(Answer::Full) => (FaultKind::Internal, "holds too many connections already"),
            Some(Answer::Lacks | Answer::Busy) | None => {
                (FaultKind::Incompatible, "does not answer as a data plane does")
            }
        };
        Err(Fault::new(kind, format!("{}: {what}", self.who(group, place))))
    }

    fn hear<const N: usize>(&self, group: &Group<'_>, place: usize, link: &mut Link) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        read_exact(link, &mut bytes, self.deadline, || self.cancelled(), &self.who(group, place))?;
        Ok(bytes)
    }

    fn say(&self, group: &Group<'_>, place: usize, link: &mut Link, bytes: &[u8]) -> Result<(), Fault> {
        link.write_all(bytes).map_err(|error| self.lost(group, place, &error))
    }
}

pub(super) fn encode(offer: &Offer) -> [u8; 16] {
    (u128::from(offer.process) | u128::from(offer.descriptor) << 32 | u128::from(offer.mark) << 64).to_le_bytes()
}

pub(super) fn decode(bytes: &[u8; 16]) -> Offer {
    let word = u128::from_le_bytes(*bytes);
    Offer { process: word as u32, descriptor: (word >> 32) as u32, mark: (word >> 64) as u64 }
}

/// A number that another process does not draw as well.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests;
