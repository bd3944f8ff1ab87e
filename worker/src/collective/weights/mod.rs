//! Weights that one worker lends another: the files of its model, read by ranges, over the same door and under the same
//! certificates as ranks' data. [`give`] serves them, on threads of their own; [`take`] reads them, from several at once.

pub mod give;
pub mod take;
pub mod words;

#[cfg(test)]
mod tests;
