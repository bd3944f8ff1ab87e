//! The bounds of everything a client may send. A number that is not here is bounded by the model.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Longest body, unless the configuration says otherwise.
pub const BODY_BYTES_MAX: usize = 16 << 20;
/// Slowest body: a client that trickles holds no buffer for longer.
pub const BODY_TIME_MAX: Duration = Duration::from_secs(60);
/// Slowest head of a request, and longest silence between two requests of a connection.
pub const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// Longest time in which a client takes nothing of its answer.
pub const WRITE_TIME_MAX: Duration = Duration::from_secs(60);
/// Connections that wait to be accepted, as far as the system allows.
pub const BACKLOG: u32 = 4096;
/// Connections at a time, where file descriptors allow as many.
pub const CONNECTIONS_MAX: usize = 16 << 10;
pub const CONNECTIONS_LEAST: usize = 16;
/// File descriptors that connections leave to workers, files and logs.
pub const FILES_KEPT: usize = 128;
/// Bodies longer than this take turns.
pub const SMALL_BODY_BYTES: usize = 64 << 10;
/// Long bodies that arrive at the same time.
pub const LONG_BODIES_MAX: usize = 64;
/// How long a long body waits for its turn.
pub const BODY_TURN_TIME_MAX: Duration = Duration::from_secs(10);
/// JSON values in a body, unless the model's longest sequence asks for more: each costs far more memory than its text.
pub const VALUES_MAX: usize = 1 << 20;
/// A prompt of more bytes for each token of the longest sequence is judged by its beginning.
pub const TOKEN_BYTES: usize = 16;
/// Text that is tokenised for its own sake may be longer than the model's longest sequence.
pub const TOKENIZE_BYTES_MAX: usize = 1 << 20;
/// Prompts in one completions request.
pub const PROMPTS_MAX: usize = 256;
/// Lower goes first.
pub const PRIORITIES: RangeInclusive<i64> = -1_000_000..=1_000_000;
/// Answers in one request, over all prompts.
pub const CHOICES_MAX: usize = 256;
/// Messages of one chat.
pub const MESSAGES_MAX: usize = 4096;
pub const TOOLS_MAX: usize = 256;
pub const STOP_TOKENS_MAX: usize = 1024;
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Candidates reported a token.
pub const LOGPROBS_MAX: i64 = 20;
/// A client's own request id, echoed.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

pub const TEMPERATURE: RangeInclusive<f64> = 0.0..=2.0;
/// Below this a temperature divides logits beyond what f32 tells apart: it is taken as 0.
pub const TEMPERATURE_LEAST: f64 = 1e-5;
/// Without its lower end.
pub const TOP_P: RangeInclusive<f64> = 0.0..=1.0;
pub const MIN_P: RangeInclusive<f64> = 0.0..=1.0;
pub const PENALTY: RangeInclusive<f64> = -2.0..=2.0;
/// Without its lower end.
pub const REPETITION: RangeInclusive<f64> = 0.0..=10.0;
pub const BIAS: RangeInclusive<f64> = -100.0..=100.0;

/// Prompts longer than this are templated and tokenised off the threads that serve sockets.
pub const INLINE_TEXT_BYTES: usize = 16 << 10;
/// How long the scheduler may take to say whether it takes a job.
pub const SUBMIT_TIME_MAX: Duration = Duration::from_secs(10);
/// A comment is sent on an event stream that was silent for so long, so that proxies keep it open.
pub const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Without a step or an idle heartbeat for longer, the server is not ready.
pub const PROGRESS_AGE_MAX: Duration = Duration::from_secs(30);
