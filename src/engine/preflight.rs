//! shim
use super::reason::Reason;
use super::remote::Tid;
pub fn check(_pid: Tid, _shell_job: bool) -> Vec<Reason> {
    vec![]
}
pub fn is_missing(pid: Tid) -> bool {
    !std::path::Path::new(&format!("/proc/{pid}")).exists()
}
pub fn check_pids_free(_p: &[u32]) -> Vec<Reason> {
    vec![]
}
