//! A streamed answer: pieces as server-sent events. There is exactly one terminal event, `[DONE]` or an error. The
//! stream owns the request: when the client leaves, the stream is dropped and the jobs are cancelled.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio_stream::Stream;

use super::error::ApiError;
use super::limits;
use super::running::Running;
use super::shape::{Shape, usage};

pub struct EventStream {
    running: Running,
    shape: Shape,
    queue: VecDeque<String>,
    ended: bool,
}

impl EventStream {
    pub fn new(running: Running, shape: Shape) -> EventStream {
        let choices = (0..running.count()).filter_map(|index| (shape.first)(&shape, index));
        let queue = choices.map(|chunk| chunk.to_string()).collect();
        EventStream { running, shape, queue, ended: false }
    }

    /// Headers and body of the response.
    pub fn respond(self) -> Response {
        let mut response = Sse::new(self).keep_alive(KeepAlive::new().interval(limits::KEEP_ALIVE)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // nginx and others would collect events before they pass them on.
        headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
        response
    }

    /// Queues what the end of the answers brings.
    fn end(&mut self) {
        if self.shape.report.usage {
            let mut last = self.shape.chunk(Value::Array(Vec::new()), self.running.usage());
            last["usage"] = usage(self.running.usage());
            self.queue.push_back(last.to_string());
        }
        self.queue.push_back("[DONE]".into());
    }
}

impl Stream for EventStream {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let stream = &mut *self;
        loop {
            if let Some(data) = stream.queue.pop_front() {
                return Poll::Ready(Some(Ok(Event::default().data(data))));
            }
            if stream.ended {
                return Poll::Ready(None);
            }
            match stream.running.poll_piece(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(piece))) if stream.shape.tells(&piece) => {
                    let choice = (stream.shape.choice)(&stream.shape, &piece);
                    let chunk = stream.shape.chunk(Value::Array(vec![choice]), stream.running.usage());
                    stream.queue.push_back(chunk.to_string());
                }
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(refusal))) => {
                    stream.queue.push_back(ApiError::from(refusal).body().to_string());
                    stream.ended = true;
                }
                Poll::Ready(None) => {
                    stream.end();
                    stream.ended = true;
                }
            }
        }
    }
}
