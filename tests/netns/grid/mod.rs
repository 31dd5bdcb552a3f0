//! A grid of connections, moved all at once, whose other ends are the test's own ([`peer`]): it sees and
//! makes each segment ([`wire`]), so that nothing depends on time. [`table`] says which connections there
//! are, [`script`] what becomes of each.

pub(crate) mod gates;
pub(crate) mod packet;
pub(crate) mod peer;
pub(crate) mod script;
pub(crate) mod table;
pub(crate) mod wire;
