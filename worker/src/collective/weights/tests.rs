//! Real sockets on loopback: givers that are sound, silent, dying or lying.

use super::words::*;
use crate::collective::authority::Authority;
use crate::collective::connect::DataPlane;
use crate::collective::hello::Answer;
use crate::collective::refused::Reason;
use crate::load::remote::{Lender, PART};
use crate::load::strip::Strip;
use model::fault::{Fault, FaultKind};
use model::plan::Epoch;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

const IDENTITY: [u8; 32] = [5; 32];

/// A folder of a test's own with two files.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("conclave-lent-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("a"), b"first").unwrap();
        std::fs::write(path.join("b"), (0..3 * PART + 77).map(|at| (at % 253) as u8).collect::<Vec<_>>()).unwrap();
        Folder(path)
    }

    fn paths(&self) -> Vec<PathBuf> {
        ["a", "b"].map(|name| self.0.join(name)).to_vec()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn plane(folder: &Folder) -> DataPlane {
    lending(DataPlane::bind("127.0.0.1:0", None).unwrap(), folder)
}

fn lending(plane: DataPlane, folder: &Folder) -> DataPlane {
    let paths = folder.paths();
    plane.lend(&IDENTITY, "t", Box::new(move || Ok(paths.clone()))).unwrap();
    plane
}

fn taker() -> DataPlane {
    DataPlane::bind("127.0.0.1:0", None).unwrap()
}

fn borrow(plane: &DataPlane, from: &[String]) -> Result<Arc<dyn Lender>, Fault> {
    plane.borrow(from, (&IDENTITY, "t"), Epoch(3))
}

fn read(lender: &dyn Lender, strip: Strip) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0; strip.bytes().unwrap() as usize];
    lender.read(1, &strip, &mut |at, part| {
        bytes[at as usize..][..part.len()].copy_from_slice(part);
        Ok(())
    })?;
    Ok(bytes)
}

fn right(strip: Strip) -> Vec<u8> {
    (0..strip.bytes().unwrap()).map(|at| (strip.place(at).start % 253) as u8).collect()
}

const ALL: Strip = Strip { start: 100, run: PART, stride: PART, count: 1 };
const SOME: Strip = Strip { start: 7, run: 300, stride: 5000, count: 600 };

#[test]
fn files_come_as_they_are_in_the_clear_and_under_tls() {
    let folder = Folder::new("whole");
    let authority = Authority::new();
    for tls in [false, true] {
        let bind = || DataPlane::bind("127.0.0.1:0", tls.then(|| authority.worker())).unwrap();
        let (giver, taker) = (lending(bind(), &folder), bind());
        let lender = borrow(&taker, &[giver.address().to_string()]).unwrap();
        assert_eq!(lender.files(), [("a".to_owned(), 5), ("b".to_owned(), 3 * PART + 77)]);
        std::thread::scope(|scope| {
            for strip in [ALL, SOME, Strip::of(3 * PART..3 * PART + 77), SOME] {
                let lender = &*lender;
                scope.spawn(move || assert_eq!(read(lender, strip).unwrap(), right(strip), "{strip:?}"));
            }
        });
    }
}

#[test]
fn who_has_no_part_is_told_why_and_counted() {
    let folder = Folder::new("strangers");
    let giver = plane(&folder);
    let (from, taker) = (vec![giver.address().to_string()], taker());
    let said = |identity: [u8; 32], token, epoch| {
        let told = taker.borrow(&from, (&identity, token), Epoch(epoch));
        told.err().map(|fault| (fault.kind, fault.text)).unwrap()
    };
    assert!(said([6; 32], "t", 3).1.contains("it has not all of the model's files"));
    assert!(said(IDENTITY, "u", 3).1.contains("closed"), "{:?}", said(IDENTITY, "u", 3));
    assert!(giver.refused().count(Reason::Token) >= 1);
    giver.abort_all(Epoch(3));
    assert!(said(IDENTITY, "t", 3).1.contains("it has a newer epoch"));
    assert!(taker.borrow(&from, (&IDENTITY, "t"), Epoch(4)).is_ok());
    // And who listens at nobody's.
    assert!(borrow(&taker, &["127.0.0.1:1".into()]).err().unwrap().text.contains("none of 1 peers"));
    let lacking = DataPlane::bind("127.0.0.1:0", None).unwrap();
    let text = borrow(&taker, &[lacking.address().to_string()]).err().unwrap().text;
    assert!(text.contains("it has not all of the model's files"), "{text}");
}

/// The first words with a giver, and what it answers to one ask.
fn ask(address: &str, ask: &[u8; ASK]) -> (Head, String) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let proof = proof("t", Epoch(1), &IDENTITY);
    socket.write_all(&Greeting { epoch: Epoch(1), proof, identity: IDENTITY }.encode()).unwrap();
    let (mut byte, mut head) = ([0], [0; HEAD]);
    socket.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [Answer::Welcome as u8]);
    socket.write_all(ask).unwrap();
    socket.read_exact(&mut head).unwrap();
    let head = Head::decode(&head).unwrap();
    let mut bytes = vec![0; head.bytes as usize];
    socket.read_exact(&mut bytes).unwrap();
    if !head.given {
        assert_eq!(socket.read(&mut byte).unwrap(), 0, "and closes");
    }
    (head, String::from_utf8_lossy(&bytes).into_owned())
}

#[test]
fn nothing_outside_the_files_is_lent() {
    let folder = Folder::new("outside");
    let giver = plane(&folder);
    let address = giver.address().to_string();
    let read = |file, strip| ask(&address, &Ask::Read { file, strip }.encode());
    assert_eq!(read(0, Strip::of(0..5)), (Head { given: true, bytes: 5 }, "first".into()));
    for (file, strip, said) in [
        (0, Strip::of(0..6), "a has 5 bytes"),
        (0, Strip { start: 4, run: 1, stride: 1 << 60, count: 2 }, "a has 5 bytes"),
        (2, Strip::of(0..1), "no such file"),
        (u32::MAX, Strip::of(0..1), "no such file"),
        (1, Strip { start: 0, run: PART, stride: PART, count: 2 }, "nothing that may be asked"),
    ] {
        let (head, text) = read(file, strip);
        assert!(!head.given && text == said, "{text}");
    }
    assert_eq!(ask(&address, &[9; ASK]).1, "nothing that may be asked");
    // A file that was cut meanwhile is an error, not the giver's end.
    std::fs::write(folder.0.join("a"), b"f").unwrap();
    assert!(!read(0, Strip::of(0..5)).0.given);
    assert!(read(1, Strip::of(0..5)).0.given);
}

type Wrong = fn(&mut TcpStream);

/// A giver that does well until it was asked so often, and then does `wrong`.
fn dying(folder: &Folder, after: usize, wrong: Wrong) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let files = [("a".to_owned(), 5), ("b".to_owned(), 3 * PART + 77)];
    let content = std::fs::read(folder.0.join("b")).unwrap();
    std::thread::spawn(move || {
        let mut asked = 0;
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            let (mut greeting, mut ask) = ([0; GREETING], [0; ASK]);
            let mut serve = |socket: &mut TcpStream, asked: &mut usize| -> std::io::Result<()> {
                socket.read_exact(&mut greeting)?;
                socket.write_all(&[Answer::Welcome as u8])?;
                loop {
                    socket.read_exact(&mut ask)?;
                    let bytes = match Ask::decode(&ask) {
                        Some(Ask::Read { strip, .. }) if *asked < after => {
                            (0..strip.bytes().unwrap()).map(|at| content[strip.place(at).start as usize]).collect()
                        }
                        Some(Ask::Read { .. }) => {
                            wrong(socket);
                            return Ok(());
                        }
                        _ => encode_list(&files),
                    };
                    *asked += 1;
                    socket.write_all(&Head { given: true, bytes: bytes.len() as u64 }.encode())?;
                    socket.write_all(&bytes)?;
                }
            };
            let _ = serve(&mut socket, &mut asked);
        }
    });
    address
}

/// How long a peer says nothing: longer than any machine takes to leave it, so that whoever waits for it is seen to.
const SILENT: Duration = Duration::from_secs(600);

#[test]
fn the_next_peer_goes_on_where_one_is_lost() {
    let folder = Folder::new("dying");
    let sound = plane(&folder);
    let wrongs: [(&str, Wrong); 3] = [
        ("closes", |_| {}),
        ("is cut in the middle", |socket| {
            let _ = socket.write_all(&Head { given: true, bytes: PART }.encode());
            let _ = socket.write_all(&[9; 5000]);
        }),
        ("falls silent", |_| std::thread::sleep(SILENT)),
    ];
    for (what, wrong) in wrongs {
        let first = dying(&folder, 3, wrong);
        let taker = taker();
        let began = Instant::now();
        let lender = borrow(&taker, &[first.clone(), sound.address().to_string()]).unwrap();
        for _ in 0..6 {
            assert_eq!(read(&*lender, ALL).unwrap(), right(ALL), "{what}");
        }
        let alone = borrow(&taker, &[dying(&folder, 2, wrong)]).unwrap();
        let fault = (0..6).find_map(|_| read(&*alone, ALL).err()).expect("it has but three answers");
        assert_eq!(fault.kind, FaultKind::RankLost, "{what}: {}", fault.text);
        assert!(fault.text.contains("none of 1 peers lends"), "{what}: {}", fault.text);
        assert!(began.elapsed() < SILENT / 2, "{what}: {:?}", began.elapsed());
    }
}

#[test]
fn an_epoch_that_ends_ends_what_is_read_for_it() {
    let folder = Folder::new("over");
    let silent = dying(&folder, 1, |_| std::thread::sleep(SILENT));
    let taker = taker();
    let lender = borrow(&taker, &[silent]).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| read(&*lender, ALL).and_then(|_| read(&*lender, ALL)));
        let began = Instant::now();
        taker.abort_all(Epoch(3));
        assert_eq!(waits.join().unwrap().unwrap_err().kind, FaultKind::StaleEpoch);
        assert!(began.elapsed() < SILENT / 2);
    });
}

#[test]
fn a_giver_serves_few_at_once_and_others_wait_for_them() {
    let folder = Folder::new("busy");
    let giver = plane(&folder);
    let taker = taker();
    let from = [giver.address().to_string()];
    let mut lenders: Vec<_> = (0..super::give::STREAMS_MAX).map(|_| borrow(&taker, &from).unwrap()).collect();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| borrow(&taker, &from).map(|lender| read(&*lender, SOME)));
        let last = lenders.pop().unwrap();
        assert_eq!(read(&*last, SOME).unwrap(), right(SOME));
        drop(last);
        assert_eq!(waits.join().unwrap().unwrap().unwrap(), right(SOME));
    });
}

#[test]
fn peers_whose_files_are_others_are_left_out() {
    let (folder, other) = (Folder::new("same"), Folder::new("other"));
    std::fs::write(other.0.join("a"), b"longer").unwrap();
    let (one, two) = (plane(&folder), plane(&other));
    let taker = taker();
    let lender = borrow(&taker, &[one.address().to_string(), two.address().to_string()]).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(read(&*lender, SOME).unwrap(), right(SOME)));
        }
    });
}
