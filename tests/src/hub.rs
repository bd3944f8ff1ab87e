//! A hub of models on loopback, as a real one's mirror answers: a listing, and files by ranges.

use anyhow::Result;
use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves the files of a folder as `org/name` until the process ends; its endpoint.
pub fn start(folder: &Path) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let folder = PathBuf::from(folder);
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let folder = folder.clone();
            // Whoever hangs up early does so in a test on purpose.
            std::thread::spawn(move || drop(serve(socket, &folder)));
        }
    });
    Ok(endpoint)
}

fn serve(mut socket: TcpStream, folder: &Path) -> Result<()> {
    let (mut first, mut begin) = (String::new(), None);
    for line in BufReader::new(&socket).lines() {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            begin = range.trim_end_matches('-').parse::<usize>().ok();
        }
        if first.is_empty() {
            first = line;
        }
    }
    let path = first.split(' ').nth(1).unwrap_or_default();
    let (head, body) = if path == "/api/models/org/name/revision/main" {
        let names: Vec<_> = fs::read_dir(folder)?.flatten().map(|entry| entry.file_name()).collect();
        let siblings: Vec<_> = names.iter().map(|name| json!({"rfilename": name.to_string_lossy()})).collect();
        (String::from("200 OK"), json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes())
    } else {
        let name = path.rsplit('/').next().unwrap_or_default();
        let mut bytes = fs::read(folder.join(name))?;
        let plain: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
        let tag = format!("ETag: \"{plain}{}\"", bytes.len());
        let length = bytes.len();
        match begin {
            Some(begin) => {
                let rest = bytes.split_off(begin.min(length));
                (format!("206 Partial Content\r\n{tag}\r\nContent-Range: bytes {begin}-{}/{length}", length - 1), rest)
            }
            None => (format!("200 OK\r\n{tag}"), bytes),
        }
    };
    write!(socket, "HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    if !first.starts_with("head") {
        socket.write_all(&body)?;
    }
    Ok(())
}
