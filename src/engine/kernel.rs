//! What this host offers and a process relies on: processor, vdso, page size. Looked at once.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::cpu;
use super::memory::PAGE_BYTES;
use super::procfs::{self, ProcfsError};
use super::reason::Reason;
use crate::proto::control::{Cpu, KernelNeeds};

/// Why this host could not be examined.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file of /proc could not be read.
    #[error("reading {path}")]
    Read {
        /// Which.
        path: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It could be read, and made no sense.
    #[error("parsing /proc/self/maps")]
    Parse(#[from] ProcfsError),
}

/// This host.
#[derive(Debug, Clone)]
pub struct Host {
    cpu: Cpu,
    vdso: KernelNeeds,
}

impl Host {
    /// Looks at processor and kernel.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn probe() -> Result<Self, HostError> {
        let failed = |path| move |source| HostError::Read { path, source };
        Ok(Self { cpu: cpu::here().map_err(failed("/proc/cpuinfo"))?, vdso: vdso()? })
    }

    /// The processor, for the other side.
    pub fn cpu(&self) -> Cpu {
        self.cpu.clone()
    }

    /// What a process from here needs of a kernel.
    pub fn kernel_needs(&self) -> KernelNeeds {
        self.vdso.clone()
    }
}

/// What a process from a host with `cpu` and `needs` would miss on this one.
pub fn missing_here(cpu: &Cpu, needs: &KernelNeeds, here: &Host) -> Vec<Reason> {
    let mut reasons = cpu::missing(cpu, &here.cpu);
    if needs.page_bytes != here.vdso.page_bytes {
        let why = format!("has pages of {} bytes there and {} here", needs.page_bytes, here.vdso.page_bytes);
        reasons.push(Reason::new("kernel", why, ""));
    }
    // The process keeps pointers into the vdso; another kernel's has its functions elsewhere.
    if needs.vdso_build_id != here.vdso.vdso_build_id || needs.vdso_pages != here.vdso.vdso_pages {
        let why = "has another vdso at the destination: the kernels are not of the same build";
        reasons.push(Reason::new("kernel", why, "run the same kernel on both hosts"));
    }
    reasons
}

/// Build id and size of our own vdso, which is everybody's.
fn vdso() -> Result<KernelNeeds, HostError> {
    const MAX_BYTES: u64 = 64 * 1024;
    let failed = |path| move |source| HostError::Read { path, source };
    let text = std::fs::read("/proc/self/maps").map_err(failed("/proc/self/maps"))?;
    let maps = procfs::parse_maps(&text)?;
    let group = maps.iter().filter(|m| m.path == b"[vdso]" || m.path.starts_with(b"[vvar"));
    let pages: u64 = group.map(|m| (m.end - m.start) / PAGE_BYTES).sum();
    let mut build_id = Vec::new();
    if let Some(m) = maps.iter().find(|m| m.path == b"[vdso]") {
        let len = usize::try_from((m.end - m.start).min(MAX_BYTES)).unwrap_or(0);
        let mut image = vec![0; len];
        let mem = File::open("/proc/self/mem").map_err(failed("/proc/self/mem"))?;
        mem.read_exact_at(&mut image, m.start).map_err(failed("/proc/self/mem"))?;
        build_id = find_build_id(&image).unwrap_or_default().to_vec();
    }
    Ok(KernelNeeds {
        vdso_build_id: build_id,
        page_bytes: u32::try_from(PAGE_BYTES).unwrap_or(0),
        vdso_pages: u32::try_from(pages).unwrap_or(0),
    })
}

/// The GNU build id note of an ELF image: name size 4, type 3, name "GNU".
fn find_build_id(image: &[u8]) -> Option<&[u8]> {
    let at = image.windows(12).position(|w| &w[4..] == b"\x03\0\0\0GNU\0")?;
    let size = u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?);
    image.get(at + 12..)?.get(..usize::try_from(size).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_lacks_nothing_of_itself() {
        let here = Host::probe().unwrap();
        assert_eq!(here.kernel_needs().vdso_build_id.len(), 20);
        assert!(here.kernel_needs().vdso_pages >= 2);
        assert_eq!(missing_here(&here.cpu(), &here.kernel_needs(), &here), []);
        let mut other = here.kernel_needs();
        other.vdso_build_id[0] ^= 1;
        assert_eq!(missing_here(&here.cpu(), &other, &here).len(), 1);
    }
}
