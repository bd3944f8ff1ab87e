//! Which bytes of a file are wanted: equal runs at equal distances, as a window of a matrix lies in its rows.

use std::ops::Range;

/// `count` runs of `run` bytes, the first at `start`, each `stride` after the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strip {
    pub start: u64,
    pub run: u64,
    pub stride: u64,
    pub count: u64,
}

impl Strip {
    /// Neighbouring bytes.
    pub fn of(range: Range<u64>) -> Strip {
        let run = range.end - range.start;
        Strip { start: range.start, run, stride: run, count: 1 }
    }

    /// Runs that touch are one.
    pub fn joined(self) -> Strip {
        if self.run == self.stride || self.count == 1 {
            return Strip::of(self.start..self.start + self.run * self.count);
        }
        self
    }

    /// Bytes of all runs; `None` where they are too many to count.
    pub fn bytes(&self) -> Option<u64> {
        self.run.checked_mul(self.count)
    }

    /// From the first byte to the last, with what lies between; `None` where nothing is asked for, where runs overlap, or
    /// where the numbers are no file's.
    pub fn extent(&self) -> Option<Range<u64>> {
        if self.run == 0 || self.count == 0 || (self.count > 1 && self.stride < self.run) {
            return None;
        }
        let last = self.stride.checked_mul(self.count - 1)?.checked_add(self.start)?;
        Some(self.start..last.checked_add(self.run)?)
    }

    /// The same bytes in strips of at most `most`.
    pub fn parts(&self, most: u64) -> Vec<Strip> {
        let Strip { start, run, stride, count } = *self;
        if run <= most {
            let each = most / run;
            let part =
                |first: u64| Strip { start: start + first * stride, run, stride, count: each.min(count - first) };
            return (0..count).step_by(each as usize).map(part).collect();
        }
        let pieces = |index: u64| {
            let (from, end) = (start + index * stride, start + index * stride + run);
            (from..end).step_by(most as usize).map(move |at| Strip::of(at..end.min(at + most)))
        };
        (0..count).flat_map(pieces).collect()
    }

    /// Where the bytes from the `at`-th on lie in the file, up to the end of their run.
    pub fn place(&self, at: u64) -> Range<u64> {
        let (index, within) = (at / self.run, at % self.run);
        let run = self.start + index * self.stride;
        run + within..run + self.run
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(strip: &Strip) -> Vec<u64> {
        (0..strip.bytes().unwrap()).map(|at| strip.place(at).start).collect()
    }

    proptest! {
        #[test]
        fn parts_are_the_whole_in_order(
            start in 0u64..50, run in 1u64..40, gap in 0u64..9, count in 1u64..20, most in 1u64..60,
        ) {
            let strip = Strip { start, run, stride: run + gap, count };
            let parts = strip.parts(most);
            prop_assert!(parts.iter().all(|part| part.bytes().unwrap() <= most));
            prop_assert_eq!(parts.iter().flat_map(bytes).collect::<Vec<_>>(), bytes(&strip));
            prop_assert_eq!(bytes(&strip.joined()), bytes(&strip));
            let extent = strip.extent().unwrap();
            prop_assert_eq!((extent.start, extent.end - 1), (start, *bytes(&strip).last().unwrap()));
        }
    }

    #[test]
    fn numbers_that_are_no_files_have_no_extent() {
        let strip = Strip { start: 8, run: 4, stride: 6, count: 3 };
        assert_eq!(strip.extent(), Some(8..24));
        for wrong in [
            Strip { run: 0, ..strip },
            Strip { count: 0, ..strip },
            Strip { stride: 3, ..strip },
            Strip { stride: u64::MAX, ..strip },
            Strip { start: u64::MAX - 3, ..strip },
            Strip { run: u64::MAX, stride: u64::MAX, ..strip },
        ] {
            assert_eq!(wrong.extent(), None, "{wrong:?}");
        }
    }
}
