//! The counter-based generator behind sampling: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", 2011). A draw is a function of its key alone, so it does not matter who draws, when, or after what.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// What a draw depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    pub seed: u64,
    /// Which of a request's answers.
    pub choice: u32,
    /// Absolute position of the token that is drawn.
    pub position: u64,
}

impl Key {
    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform(self) -> f64 {
        let counter = [self.position as u32, (self.position >> 32) as u32, self.choice, 0];
        let [a, b, _, _] = philox(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
        bits as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_gives_the_published_vectors() {
        for (counter, key, out) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), out);
        }
    }

    #[test]
    fn draws_differ_by_every_part_of_the_key_and_fill_the_interval() {
        let base = Key { seed: 7, choice: 0, position: 3 };
        let others = [
            Key { seed: 8, ..base },
            Key { seed: 7 << 32, ..base },
            Key { choice: 1, ..base },
            Key { position: 4, ..base },
        ];
        for other in others {
            assert_ne!(base.uniform(), other.uniform(), "{other:?}");
        }
        let mean = (0..4096).map(|position| Key { position, ..base }.uniform()).sum::<f64>() / 4096.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
    }
}
