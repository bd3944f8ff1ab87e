//! TLS over one socket of the data plane, without a thread and without waiting: whoever has the socket drives it.
//!
//! Numbers are encrypted into the session's own buffer and go to the kernel from there, so a frame is sent only when the
//! session [owes](Session::owes) nothing.

use proto::tls::ranks::{is_about_certificates, reason, worker_name};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use std::io::{Error, ErrorKind, IoSlice, Read, Result, Write};
use std::net::TcpStream;
use std::sync::Arc;

/// Ciphertext that may wait for the kernel: a few times what one call hands over.
const BUFFER: usize = 256 << 10;

/// One end of an encrypted connection.
pub struct Session {
    connection: Connection,
}

impl Session {
    /// The end that dials a worker.
    pub fn dialling(config: Arc<ClientConfig>) -> Result<Session> {
        let connection = ClientConnection::new(config, worker_name()).map_err(broken)?;
        Ok(Session::of(connection.into()))
    }

    /// The end that listens.
    pub fn listening(config: Arc<ServerConfig>) -> Result<Session> {
        Ok(Session::of(ServerConnection::new(config).map_err(broken)?.into()))
    }

    fn of(mut connection: Connection) -> Session {
        connection.set_buffer_limit(Some(BUFFER));
        Session { connection }
    }

    /// Whether both ends have not shown each other who they are yet.
    pub fn is_new(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Whether the kernel has not taken yet what was written.
    pub fn owes(&self) -> bool {
        self.connection.wants_write()
    }

    /// As `TcpStream::read`. An error of kind [`ErrorKind::InvalidData`] is the wrong of the peer's certificate, or of
    /// ours, [`ErrorKind::ConnectionAborted`] what is no TLS, or was touched on the way; both in words.
    pub fn read(&mut self, mut socket: &TcpStream, bytes: &mut [u8]) -> Result<usize> {
        loop {
            match self.connection.reader().read(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
            if self.take(&mut socket)? == 0 {
                return Ok(0);
            }
        }
    }

    /// One step of the handshake, which may wait as long as the socket's own read does; whether it is over.
    pub fn greet(&mut self, mut socket: &TcpStream) -> Result<bool> {
        self.flush(socket)?;
        if self.is_new() && self.take(&mut socket)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.flush(socket)?;
        Ok(!self.is_new())
    }

    /// Reads from the socket once, and answers what TLS itself asks for; how much came.
    fn take(&mut self, socket: &mut &TcpStream) -> Result<usize> {
        let count = self.connection.read_tls(socket)?;
        let taken = self.connection.process_new_packets();
        if (taken.is_err() || self.owes())
            && let Err(error) = self.flush(socket)
            && taken.is_ok()
            && error.kind() != ErrorKind::WouldBlock
        {
            return Err(error);
        }
        taken.map_err(broken)?;
        Ok(count)
    }

    /// Takes some of `head` followed by `body`; how much. The kernel may get it only with a later [`Session::flush`].
    pub fn write(&mut self, socket: &TcpStream, head: &[u8], body: &[u8]) -> Result<usize> {
        if self.owes() {
            self.flush(socket)?;
        }
        let count = self.connection.writer().write_vectored(&[IoSlice::new(head), IoSlice::new(body)])?;
        match self.flush(socket) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(count),
        }
    }

    /// Hands the kernel what is owed.
    pub fn flush(&mut self, mut socket: &TcpStream) -> Result<()> {
        while self.owes() {
            self.connection.write_tls(&mut socket)?;
        }
        Ok(())
    }

    /// As `Write::write_all` on a socket that waits. Before the handshake is over what is said waits for it.
    pub fn write_all(&mut self, socket: &TcpStream, bytes: &[u8]) -> Result<()> {
        self.connection.writer().write_all(bytes)?;
        if self.is_new() { Ok(()) } else { self.flush(socket) }
    }
}

fn broken(error: rustls::Error) -> Error {
    let kind = if is_about_certificates(&error) { ErrorKind::InvalidData } else { ErrorKind::ConnectionAborted };
    Error::new(kind, reason(&error))
}
