//! How the GPUs of a rank's groups reach each other: by NCCL where every member has it and a GPU of its own, by their hosts
//! otherwise. Either way the numbers are the same: what NCCL moves is added in the canonical order, on the GPU.

use crate::backend::cuda::Device;
use crate::collective::connect::Communicators;
use crate::collective::device::{DeviceCollective, Devices, Queue};
use crate::collective::hello::Kind;
use crate::collective::nccl::{Library, Nccl, Options, obstacle};
use crate::collective::timed::Stopwatch;
use crate::collective::{Abort, Collective};
use model::fault::Fault;
use std::sync::Arc;

/// Connects the devices of all members, who call it at about the same time. `stopwatch` is the rank's; `remember` is told how to end
/// what was connected.
pub fn connect(
    device: &Arc<Device>,
    communicators: &mut Communicators,
    stopwatch: &Arc<Stopwatch>,
    remember: &dyn Fn(&Arc<dyn Abort>),
) -> Result<(), Fault> {
    let library = Library::open();
    let members = |host: &mut dyn Collective, kind: Kind| -> Result<Option<Box<dyn DeviceCollective>>, Fault> {
        if host.size() == 1 {
            return Ok(None);
        }
        let queue = device.queue()?;
        let why = obstacle(&library, host, queue.device()?)?;
        let (None, Ok(library)) = (&why, &library) else {
            let why = why.unwrap_or_default();
            tracing::warn!("{} GPUs exchange through host memory: {why}", host.size());
            return Ok(None);
        };
        let options = Options { stopwatch: stopwatch.clone(), kind, ..Options::default() };
        let members = Nccl::connect(library, host, queue, &options)?;
        remember(&members.abort_handle());
        tracing::info!("{} GPUs exchange by NCCL {}", host.size(), library.version());
        Ok(Some(Box::new(members)))
    };
    let Communicators { tensor, lane, pipe, .. } = communicators;
    communicators.devices = Devices {
        tensor: members(&mut **tensor, Kind::Tensor)?,
        lane: members(&mut **lane, Kind::Lane)?,
        pipe: members(&mut **pipe, Kind::Pipe)?,
    };
    Ok(())
}
