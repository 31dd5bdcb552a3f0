//! What the link carries: frames without any process behind them, through our own transport.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use migrate::identity::Node;
use migrate::pageserver::frame;
use migrate::pageserver::pack::{Compression, Packer};
use migrate::testbed::{Lan, STATE};
use migrate::transport::{self, Incoming, Server, Settings, TransportError};

const PORT: u16 = 7099;
/// Pages packed once and sent again and again.
const PAGES: usize = 64;

/// Bytes per second from host `a` to host `b`, over the sending of `bytes`.
pub(crate) fn measure(lan: &Lan, bytes: u64) -> Result<f64> {
    let node = Arc::new(Node::open(&lan.a.outside(STATE))?);
    let address: SocketAddr = format!("{}:{PORT}", Lan::B).parse()?;
    let (ready, is_ready) = std::sync::mpsc::channel();
    let theirs = node.clone();
    let receiver = Lan::inside(&lan.b, "receiver", move || receive(theirs, address, &ready))?;
    is_ready.recv().context("the receiver did not start")?;
    let sender = Lan::inside(&lan.a, "sender", move || send(node, address, bytes))?;
    let took = sender.join().map_err(|_| anyhow!("the sender panicked"))???;
    receiver.join().map_err(|_| anyhow!("the receiver panicked"))???;
    Ok(bytes as f64 / took.as_secs_f64())
}

fn receive(node: Arc<Node>, address: SocketAddr, ready: &std::sync::mpsc::Sender<()>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut server = Server::bind(node, address, Settings::default(), migrate::hello::hello)?;
        let _ = ready.send(());
        let link = server.accept().await.context("the endpoint failed")?;
        let mut link = link.map_err(|failed| failed.error)?;
        let reader = std::thread::spawn(move || {
            loop {
                match link.recv_timeout(Duration::from_secs(10)) {
                    Some(Incoming::Frame(_) | Incoming::Control(_)) => {}
                    Some(Incoming::Lost(TransportError::Finished)) => {
                        return link.finish(Duration::from_secs(2)).err();
                    }
                    Some(Incoming::Lost(error)) => return Some(error),
                    None => return Some(TransportError::Closed),
                }
            }
        });
        let ended = tokio::task::spawn_blocking(move || reader.join()).await?;
        server.shutdown().await;
        match ended {
            Ok(None | Some(TransportError::Finished)) => Ok(()),
            Ok(Some(error)) => Err(error.into()),
            Err(_) => bail!("the reader panicked"),
        }
    })
}

fn send(node: Arc<Node>, address: SocketAddr, bytes: u64) -> Result<Duration> {
    let link = transport::connect(node, vec![address], migrate::hello::hello(), Settings::default())?;
    let frames = frames()?;
    let sender = link.sender();
    let start = Instant::now();
    let mut sent = 0;
    while sent < bytes {
        for frame in &frames {
            sender.send_frame_blocking(frame.clone())?;
            sent += frame.len() as u64;
        }
    }
    sender.send_frame_blocking(frame::round_end(1))?;
    // Ends once all of it was received.
    link.finish(Duration::from_secs(30))?;
    Ok(start.elapsed())
}

fn frames() -> Result<Vec<bytes::Bytes>> {
    let contents: Vec<u8> = (0..PAGES * 4096).map(|at| (at % 251) as u8).collect();
    let addresses: Vec<u64> = (1..=PAGES as u64).map(|page| page * 4096).collect();
    let mut frames = Vec::new();
    let mut sink = |bytes| {
        frames.push(bytes);
        Ok::<(), std::convert::Infallible>(())
    };
    let mut packer = Packer::new(Compression::Off, true);
    packer.pack(1, &addresses, &contents, &mut sink)?;
    packer.flush(&mut sink)?;
    Ok(frames)
}
