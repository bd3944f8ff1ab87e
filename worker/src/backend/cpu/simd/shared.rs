//! A slice that the tasks of one job write to, each its own part.

use std::marker::PhantomData;

/// Borrowed mutable memory that several threads may take disjoint parts of.
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are only lent by the unsafe `part`, whose callers keep them disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: it is a borrowed mutable slice.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Shared<'a, T> {
        Shared { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// # Safety
    /// No two parts lent at the same time overlap.
    #[allow(clippy::mut_from_ref)] // the point of the type
    pub unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "{at} + {len} of {}", self.len);
        // SAFETY: inside the slice; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }

    /// The start, for kernels that write strided parts; the caller keeps inside `len` and disjoint.
    pub fn pointer(&self) -> *mut T {
        self.start
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
