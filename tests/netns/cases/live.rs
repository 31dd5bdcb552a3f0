//! Real servers whose clients never reconnect: HTTP, WebSocket, and TLS in several languages.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use migrate::testbed::{Host, Job, Lan, SHARED, Spawn};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::tcp::service_of_other;
use crate::case::{Case, Need, Result, ensure};
use crate::plain::{Plain, echo, pattern, same};
use crate::resets::Resets;
use crate::workload::{go, sources};

const PORT: u16 = 8443;
const MOVES: usize = 2;
const MOVE: Duration = Duration::from_secs(120);
const READY: Duration = Duration::from_secs(30);
/// Clients of each kind.
const CLIENTS: usize = 3;
/// What nginx sends and takes at a time.
const FILE_BYTES: usize = 4 << 20;
const OPTIONS: [&str; 3] = ["--tcp-established", "--move-ip", Lan::MOVE_IP];

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("live/nginx", nginx).needs(Need::Program("nginx")),
        Case::new("live/websocket_node", websocket).needs(Need::Program("node")),
        Case::new("live/tls_asyncio", |lan| {
            let script = sources().join("tls_echo.py").to_string_lossy().into_owned();
            tls(lan, &["/usr/bin/python3", "-u", &script])
        })
        .needs(Need::Program("python3")),
        Case::new("live/tls_go", |lan| tls(lan, &[&go("tls_echo")?])).needs(Need::Program("go")),
    ]
}

fn address() -> Result<SocketAddr> {
    Ok(SocketAddr::new(Lan::SERVICE.parse()?, PORT))
}

/// Moves the server there and back under its clients.
fn moves(lan: &Lan, server: &Job, clients: Plain) -> Result {
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let resets = Resets::watch(lan, PORT)?;
    let moved = (|| -> Result {
        clients.get_on()?;
        let mut here = &lan.a;
        for _ in 0..MOVES {
            let to = service_of_other(lan, here, &services);
            lan.move_to(here, to, server.pid, &OPTIONS, MOVE)?.expect_moved()?;
            here = lan.other(here);
            clients.get_on()?;
        }
        ensure(here.proc(server.pid).exists(), || "it is on the wrong host".to_owned())?;
        resets.none(lan)
    })();
    // What a client has to say explains the rest.
    let longest = clients.finish()?;
    moved?;
    println!("    longest exchange {:.1} ms", longest.as_secs_f64() * 1000.0);
    Ok(())
}

/// Downloads and uploads without end over connections that stay.
fn nginx(lan: &Lan) -> Result {
    let folder = format!("{SHARED}/nginx");
    let outside = lan.a.outside(&folder);
    for name in ["www/up", "temp"] {
        std::fs::create_dir_all(outside.join(name))?;
    }
    std::fs::write(outside.join("www/big"), pattern(0, FILE_BYTES))?;
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {folder}/temp/{kind};\n"))
        .collect();
    let text = format!(
        "daemon off; master_process off; user root; worker_processes 1; pid {folder}/pid;\n\
         error_log {folder}/errors;\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log off; keepalive_requests 1000000; sendfile on; root {folder}/www;\n{temporary}\
         server {{ listen {PORT}; location /up/ {{ dav_methods PUT; client_max_body_size 0; }} }} }}\n"
    );
    std::fs::write(outside.join("conf"), text)?;
    let conf = format!("{folder}/conf");
    let server = lan.a.spawn(&Spawn::new(["nginx", "-e", "stderr", "-c", &conf]))?;
    listening(&lan.a)?;
    let mut clients = Plain::default();
    for number in 0..CLIENTS {
        let wanted = pattern(0, FILE_BYTES);
        clients.add(
            lan,
            format!("download {number}"),
            address()?,
            |stream| Ok(BufReader::new(stream)),
            move |stream, _| {
                stream.get_mut().write_all(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")?;
                same(&wanted, &body(stream, "200")?)
            },
        )?;
        clients.add(
            lan,
            format!("upload {number}"),
            address()?,
            |stream| Ok(BufReader::new(stream)),
            move |stream, turn| {
                let head =
                    format!("PUT /up/{number} HTTP/1.1\r\nHost: x\r\nContent-Length: {FILE_BYTES}\r\n\r\n");
                stream.get_mut().write_all(head.as_bytes())?;
                stream.get_mut().write_all(&pattern(turn, FILE_BYTES))?;
                body(stream, if turn == 0 { "201" } else { "204" }).map(drop)?;
                // What arrived, as another connection would see it.
                let get = format!("GET /up/{number} HTTP/1.1\r\nHost: x\r\n\r\n");
                stream.get_mut().write_all(get.as_bytes())?;
                same(&pattern(turn, FILE_BYTES), &body(stream, "200")?)
            },
        )?;
    }
    moves(lan, &server, clients)
}

/// The body of an answer with this status.
fn body(stream: &mut BufReader<TcpStream>, status: &str) -> io::Result<Vec<u8>> {
    let (mut line, mut length, mut first) = (String::new(), 0, true);
    loop {
        line.clear();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if std::mem::take(&mut first) && line.split(' ').nth(1) != Some(status) {
            return Err(io::Error::other(format!("not {status} but {line:?}")));
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Frames of all three lengths there and back (RFC 6455).
fn websocket(lan: &Lan) -> Result {
    let script = sources().join("websocket.js").to_string_lossy().into_owned();
    let server = ready(lan, &Spawn::new(["node", &script, &PORT.to_string()]))?;
    let mut clients = Plain::default();
    for number in 0..CLIENTS {
        clients.add(
            lan,
            format!("websocket {number}"),
            address()?,
            |stream| {
                let mut stream = BufReader::new(stream);
                stream.get_mut().write_all(
                    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                      Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
                )?;
                body(&mut stream, "101")?;
                Ok(stream)
            },
            |stream, turn| {
                const MASK: [u8; 4] = [0x12, 0x34, 0x56, 0x78];
                let sent = pattern(turn, [100, 1000, 100_000][usize::try_from(turn % 3).unwrap_or(0)]);
                let mut frame = head(0x80, sent.len());
                frame.extend_from_slice(&MASK);
                frame.extend(sent.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
                stream.get_mut().write_all(&frame)?;
                let wanted = head(0, sent.len());
                let mut got = vec![0; wanted.len() + sent.len()];
                stream.read_exact(&mut got)?;
                same(&wanted, &got[..wanted.len()])?;
                same(&sent, &got[wanted.len()..])
            },
        )?;
    }
    moves(lan, &server, clients)
}

/// Head of a binary frame, without the mask.
fn head(masked: u8, length: usize) -> Vec<u8> {
    let mut head = vec![0x82];
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short), _) if short < 126 => head.push(masked | short),
        (_, Ok(middle)) => {
            head.push(masked | 126);
            head.extend_from_slice(&middle.to_be_bytes());
        }
        _ => {
            head.push(masked | 127);
            head.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    head
}

/// An echo behind TLS, whose keys and counters are nowhere but in its memory.
fn tls(lan: &Lan, program: &[&str]) -> Result {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let [certificate, key] = ["certificate.pem", "key.pem"].map(|name| format!("{SHARED}/{name}"));
    std::fs::write(lan.a.outside(&certificate), made.cert.pem())?;
    std::fs::write(lan.a.outside(&key), made.signing_key.serialize_pem())?;
    let port = PORT.to_string();
    let words = program.iter().copied().chain([port.as_str(), &certificate, &key]);
    let server = ready(lan, &Spawn::new(words))?;
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone())?;
    let config = Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth());
    let mut clients = Plain::default();
    for number in 0..CLIENTS {
        let config = Arc::clone(&config);
        clients.add(
            lan,
            format!("tls {number}"),
            address()?,
            move |stream| {
                let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
                let session = ClientConnection::new(config, name).map_err(io::Error::other)?;
                Ok(StreamOwned::new(session, stream))
            },
            echo,
        )?;
    }
    moves(lan, &server, clients)
}

/// Starts a server that says `ready`.
fn ready(lan: &Lan, spawn: &Spawn) -> Result<Job> {
    let job = lan.a.spawn(spawn)?;
    lan.a.wait_line(&job, "ready", 0, READY)?;
    Ok(job)
}

/// Waits until somebody listens, without connecting: that would be refused before.
fn listening(host: &Host) -> Result {
    let port = format!("sport = :{PORT}");
    migrate::testbed::wait_for("a listening server", READY, || {
        Ok(host.net(&["ss", "-Htln", &port])?.contains("LISTEN").then_some(()))
    })?;
    Ok(())
}
