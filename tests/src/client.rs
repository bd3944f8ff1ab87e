//! Many HTTP requests at a time: connections that are kept and used again, and ones that are left at any moment.

use crate::process::{Answer, answer};
use anyhow::{Context, Result, ensure};
use std::sync::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Connections to one server.
pub struct Client {
    address: String,
    idle: Mutex<Vec<TcpStream>>,
}

impl Client {
    pub fn new(address: &str) -> Client {
        Client { address: address.into(), idle: Mutex::new(Vec::new()) }
    }

    pub async fn connect(&self) -> Result<TcpStream> {
        let socket = TcpStream::connect(&self.address).await?;
        socket.set_nodelay(true)?;
        Ok(socket)
    }

    /// A request as bytes.
    pub fn request(path: &str, body: &str) -> Vec<u8> {
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n");
        format!("{head}content-length: {length}\r\n\r\n{body}").into_bytes()
    }

    /// Posts on a connection that is idle, or a new one, and reads an answer whose length is told.
    pub async fn post(&self, path: &str, body: &str) -> Result<Answer> {
        let request = Client::request(path, body);
        let kept = self.idle.lock().expect("no holder panics").pop();
        if let Some(socket) = kept {
            // The server may just have closed what was idle; nothing was computed then.
            if let Ok(answer) = self.exchange(socket, &request).await {
                return Ok(answer);
            }
        }
        self.exchange(self.connect().await?, &request).await
    }

    async fn exchange(&self, mut socket: TcpStream, request: &[u8]) -> Result<Answer> {
        socket.write_all(request).await?;
        let (mut bytes, mut part) = (Vec::new(), [0; 16 << 10]);
        loop {
            let count = socket.read(&mut part).await?;
            ensure!(count > 0, "the connection ended after {} bytes", bytes.len());
            bytes.extend_from_slice(&part[..count]);
            if whole(&bytes)? {
                break;
            }
        }
        let answer = answer(&bytes)?;
        if !answer.head.contains("connection: close") {
            self.idle.lock().expect("no holder panics").push(socket);
        }
        Ok(answer)
    }
}

/// Whether head and body are there.
fn whole(bytes: &[u8]) -> Result<bool> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(false) };
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")).context("no length")?;
    Ok(bytes.len() - end - 4 >= length.trim().parse::<usize>()?)
}
