//! A destination of another version: real QUIC with a key of its own, and a Hello that this build does not
//! speak.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use migrate::identity::Fingerprint;
use migrate::testbed::{Host, Lan};
use migrate::wire::{self, Body, Hello};
use rustls::pki_types::PrivateKeyDer;

use crate::case::Result;

/// The version that it speaks.
pub(crate) const VERSION: u32 = 4711;
/// How long it may take to be there, and longer than any test of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running one; it ends with its host's test.
pub(crate) struct Stranger {
    /// What it is known by.
    pub(crate) fingerprint: String,
    /// Where it listens.
    pub(crate) address: String,
}

impl Stranger {
    /// Starts it in the network of a host. It answers one connection.
    pub(crate) fn start(host: &Host, address: &str) -> Result<Self> {
        let address = SocketAddr::new(address.parse()?, 7077);
        let key = rcgen::generate_simple_self_signed(["migrate".to_owned()])?;
        let fingerprint = Fingerprint::of(key.cert.der()).to_string();
        let private = PrivateKeyDer::try_from(key.signing_key.serialize_der())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut crypto = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], private)?;
        crypto.alpn_protocols = vec![b"migrate".to_vec()];
        let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(crypto)?;
        let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        let (ready, listens) = channel();
        Lan::inside(host, "stranger", move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
            runtime.block_on(async move {
                let endpoint = quinn::Endpoint::server(config, address).ok()?;
                ready.send(()).ok()?;
                tokio::time::timeout(PATIENCE, serve(&endpoint)).await.ok()?
            })
        })?;
        listens.recv_timeout(PATIENCE)?;
        Ok(Self { fingerprint, address: address.to_string() })
    }
}

/// Says hello to the first who comes, and waits until it has gone.
async fn serve(endpoint: &quinn::Endpoint) -> Option<()> {
    let connection = endpoint.accept().await?.await.ok()?;
    let (mut send, mut receive) = connection.accept_bi().await.ok()?;
    let mut role = [0];
    receive.read_exact(&mut role).await.ok()?;
    let hello = Hello { version: VERSION, software: "another".to_owned(), ..Hello::default() };
    send.write_all(&wire::encode(&Body::Hello(hello).into()).ok()?).await.ok()?;
    connection.closed().await;
    Some(())
}
