//! Memory that ops keep between calls: small arrays of the host, and numbers on their way from one kernel to the next.

use super::Device;
use super::driver::Address;
use super::memory::Piece;
use model::fault::Fault;
use std::sync::Arc;

/// Arrays of one op, gathered so that they travel in one copy.
#[derive(Default)]
pub struct Parcel(Vec<u8>);

/// Where an array lies in its parcel.
#[derive(Clone, Copy)]
pub struct Offset(usize);

impl Parcel {
    pub fn add<T: bytemuck::Pod>(&mut self, values: &[T]) -> Offset {
        self.0.resize(self.0.len().next_multiple_of(16), 0);
        let at = self.0.len();
        self.0.extend_from_slice(bytemuck::cast_slice(values));
        Offset(at)
    }
}

/// Pieces that only grow.
pub struct Scratch {
    device: Arc<Device>,
    pieces: [Option<Piece>; 4],
}

/// What a piece of scratch memory is for.
#[derive(Clone, Copy)]
pub enum Use {
    Parcel,
    Inputs,
    Products,
    Answers,
}

impl Scratch {
    pub fn new(device: Arc<Device>) -> Scratch {
        Scratch { device, pieces: [const { None }; 4] }
    }

    /// At least `bytes`, whose contents are lost when it grows.
    pub fn room(&mut self, of: Use, bytes: usize) -> Result<Address, Fault> {
        let piece = &mut self.pieces[of as usize];
        if piece.as_ref().is_none_or(|piece| piece.bytes < bytes) {
            *piece = None;
            *piece = Some(self.device.memory.piece(bytes.next_power_of_two())?);
        }
        Ok(piece.as_ref().map_or(0, |piece| piece.at))
    }

    /// Sends a parcel; what an earlier op was sent is passed by the time that this is written.
    pub fn send(&mut self, parcel: &Parcel) -> Result<impl Fn(Offset) -> Address + use<>, Fault> {
        let at = self.room(Use::Parcel, parcel.0.len())?;
        self.device.driver.upload(at, &parcel.0)?;
        Ok(move |offset: Offset| at + offset.0 as u64)
    }
}
