//! Ranks that are threads of one process.

use super::shared::{Seats, Shared};
use super::wait::spin_for;
use model::fault::Fault;
use std::sync::Arc;

/// The members of a new communicator, in rank order: give one to each thread.
pub fn members(size: usize) -> Result<Vec<Shared>, Fault> {
    members_spinning(size, spin_for(size))
}

/// As [`members`], with the number of idle turns before a waiting rank sleeps.
pub fn members_spinning(size: usize, spin: u32) -> Result<Vec<Shared>, Fault> {
    let seats = Arc::new(Seats::anonymous(size)?);
    Ok((0..size).map(|rank| Shared::new(seats.clone(), rank, spin)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Collective;
    use crate::collective::suite::{Members, contract, each};

    fn boxed(size: usize) -> Members {
        members(size).unwrap().into_iter().map(|member| Box::new(member) as Box<dyn Collective>).collect()
    }

    contract!(boxed);

    #[test]
    fn spinning_members_agree_as_sleeping_ones_do() {
        for spin in [0, 100_000] {
            let members = members_spinning(2, spin).unwrap();
            each(members.into_iter().map(|member| Box::new(member) as Box<dyn Collective>).collect(), |mut member| {
                for turn in 0..2000 {
                    let mut values = [member.rank() as f32 + turn as f32; 700];
                    member.sum(&mut values).unwrap();
                    assert_eq!(values, [1.0 + 2.0 * turn as f32; 700]);
                }
            });
        }
    }
}
