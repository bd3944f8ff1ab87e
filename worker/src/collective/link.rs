//! A connection of the data plane as it comes from the door or from a dial: in the clear, or under TLS.

use super::credentials::Credentials;
use super::session::Session;
use super::sockets::{Interest, poll};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How often a wait looks whether it is still wanted.
pub const GLANCE: Duration = Duration::from_millis(20);

/// A socket, and what guards it.
pub struct Link {
    pub socket: TcpStream,
    pub session: Option<Box<Session>>,
}

impl Link {
    /// The end that has dialled. `hello` goes as soon as the peer has shown who it is, which `cancelled` and the deadline
    /// cut short.
    pub fn dialled(
        socket: TcpStream,
        credentials: Option<&Credentials>,
        hello: &[u8],
        deadline: Instant,
        cancelled: impl Fn() -> bool,
    ) -> Result<Link> {
        let Some(credentials) = credentials else {
            (&socket).write_all(hello)?;
            return Ok(Link { socket, session: None });
        };
        let mut session = Session::dialling(credentials.current().dials)?;
        // Said with the last words of the handshake: a peer that refuses has read all there is, so that its reason arrives.
        session.write_all(&socket, hello)?;
        socket.set_nonblocking(true)?;
        loop {
            match session.greet(&socket) {
                Ok(true) => break,
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                Ok(false) | Err(_) => {}
            }
            if cancelled() || Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::TimedOut, "did not greet in time"));
            }
            poll(&mut [Interest::of(&socket, session.owes())], GLANCE);
        }
        socket.set_nonblocking(false)?;
        Ok(Link { socket, session: Some(Box::new(session)) })
    }

    /// The end that was dialled; its handshake goes on as it is read.
    pub fn accepted(socket: TcpStream, credentials: Option<&Credentials>) -> Result<Link> {
        let session = credentials.map(|credentials| Session::listening(credentials.current().listens)).transpose()?;
        Ok(Link { socket, session: session.map(Box::new) })
    }

    /// Both ends of a connection within this process, greeted.
    pub fn pair(dialling: TcpStream, accepting: TcpStream, credentials: Option<&Credentials>) -> Result<(Link, Link)> {
        let mut accepted = Link::accepted(accepting, credentials)?;
        let Some(credentials) = credentials else { return Ok((Link { socket: dialling, session: None }, accepted)) };
        let mut dialled = Session::dialling(credentials.current().dials)?;
        dialling.set_nonblocking(true)?;
        accepted.socket.set_nonblocking(true)?;
        let session = accepted.session.as_mut().expect("as the credentials say");
        let waits = |greeted: Result<bool>| match greeted {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            other => other,
        };
        while !(waits(dialled.greet(&dialling))? & waits(session.greet(&accepted.socket))?) {
            poll(&mut [Interest::of(&dialling, false), Interest::of(&accepted.socket, false)], GLANCE);
        }
        Ok((Link { socket: dialling, session: Some(Box::new(dialled)) }, accepted))
    }

    /// What to wait for.
    pub fn interest(&self) -> Interest<'_> {
        Interest::of(&self.socket, self.session.as_ref().is_some_and(|session| session.owes()))
    }

    /// As `TcpStream::read`.
    pub fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        match &mut self.session {
            None => self.socket.read(bytes),
            Some(session) => session.read(&self.socket, bytes),
        }
    }

    /// As `TcpStream::write_all`, for few bytes or a socket that waits.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.session {
            None => self.socket.write_all(bytes),
            Some(session) => session.write_all(&self.socket, bytes),
        }
    }
}

impl<'a> Interest<'a> {
    fn of(socket: &'a TcpStream, write: bool) -> Interest<'a> {
        Interest { socket: socket.as_fd(), read: true, write, ready: false }
    }
}
