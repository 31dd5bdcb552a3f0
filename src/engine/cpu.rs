//! What the CPU can do, and whether a process that has seen one CPU can go on with another.
//!
//! Programs ask once which instructions there are, and use them for the rest of their life: the
//! destination must have all that the source has, whether the process uses them or not.

use super::reason::Reason;
use super::sys::attrs;
use crate::proto::control::Cpu;

/// Flags of /proc/cpuinfo that stand for instructions or registers of user programs. The others are
/// about the kernel's use of the CPU, and differ without harm.
const FLAGS_OF_PROGRAMS: &[&str] = &[
    "3dnow",
    "3dnowext",
    "3dnowprefetch",
    "abm",
    "adx",
    "aes",
    "amx_bf16",
    "amx_complex",
    "amx_fp16",
    "amx_int8",
    "amx_tile",
    "avx",
    "avx10",
    "avx2",
    "avx512_4fmaps",
    "avx512_4vnniw",
    "avx512_bf16",
    "avx512_bitalg",
    "avx512_fp16",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_vp2intersect",
    "avx512_vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vbmi",
    "avx512vl",
    "avx_ifma",
    "avx_ne_convert",
    "avx_vnni",
    "avx_vnni_int16",
    "avx_vnni_int8",
    "bmi1",
    "bmi2",
    "cldemote",
    "clflush",
    "clflushopt",
    "clwb",
    "clzero",
    "cmov",
    "cmpccxadd",
    "cx16",
    "cx8",
    "enqcmd",
    "f16c",
    "fma",
    "fma4",
    "fpu",
    "fsgsbase",
    "fsrm",
    "fxsr",
    "gfni",
    "lahf_lm",
    "lwp",
    "misalignsse",
    "mmx",
    "mmxext",
    "monitorx",
    "movbe",
    "movdir64b",
    "movdiri",
    "mwaitx",
    "ospke",
    "pclmulqdq",
    "pku",
    "pni",
    "popcnt",
    "prefetchi",
    "prefetchwt1",
    "ptwrite",
    "raoint",
    "rdpid",
    "rdpru",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "hle",
    "serialize",
    "sha512",
    "sha_ni",
    "sm3",
    "sm4",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "tsxldtrk",
    "tsc",
    "user_shstk",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "xgetbv1",
    "xop",
    "xsave",
    "xsavec",
    "xsaveopt",
];

/// This machine's CPU.
///
/// # Errors
/// If /proc/cpuinfo cannot be read.
pub fn here() -> std::io::Result<Cpu> {
    let info = std::fs::read_to_string("/proc/cpuinfo")?;
    let (xcr0, xstate_bytes) = attrs::extended_state();
    Ok(Cpu { arch: std::env::consts::ARCH.into(), flags: flags(&info), xcr0, xstate_bytes })
}

/// The flags of the first CPU; the kernel keeps the others alike.
fn flags(info: &str) -> Vec<String> {
    let line = info.lines().find_map(|l| l.strip_prefix("flags")?.trim_start().strip_prefix(':'));
    line.unwrap_or_default().split_ascii_whitespace().map(str::to_owned).collect()
}

/// What a process from a machine like `theirs` would miss on one like `ours`.
pub fn missing(theirs: &Cpu, ours: &Cpu) -> Vec<Reason> {
    if theirs.arch != ours.arch {
        let why = format!("is {} there and {} here", theirs.arch, ours.arch);
        return vec![Reason::new("CPU", why, "")];
    }
    let mut reasons = Vec::new();
    let remedy = "choose a destination with the same or a newer CPU";
    let lacking = |f: &&&str| theirs.flags.iter().any(|t| t == **f) && !ours.flags.iter().any(|o| o == **f);
    let flags: Vec<&str> = FLAGS_OF_PROGRAMS.iter().filter(lacking).copied().collect();
    if !flags.is_empty() {
        let why = format!("has no {} here, which programs from there may use", flags.join(", "));
        reasons.push(Reason::new("CPU", why, remedy));
    }
    let states = theirs.xcr0 & !ours.xcr0;
    if states != 0 {
        let why = format!("has no registers of the kinds {states:#x} (XCR0) here");
        reasons.push(Reason::new("CPU", why, remedy));
    } else if theirs.xstate_bytes > ours.xstate_bytes {
        let (there, here) = (theirs.xstate_bytes, ours.xstate_bytes);
        let why = format!("has extended registers of {there} bytes there and {here} here");
        reasons.push(Reason::new("CPU", why, remedy));
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_cpu_is_as_ptrace_has_it() {
        let cpu = here().unwrap();
        assert!(cpu.flags.iter().any(|f| f == "sse2"));
        assert_eq!(missing(&cpu, &cpu), []);
        let child = crate::engine::trial::Killed::sleeper();
        let tid = child.pid();
        crate::engine::sys::ptrace::seize(tid, 0).unwrap();
        crate::engine::sys::ptrace::interrupt(tid).unwrap();
        crate::engine::sys::ptrace::wait(tid).unwrap();
        let xstate = crate::engine::sys::ptrace::xstate(tid).unwrap();
        assert_eq!(xstate.len(), cpu.xstate_bytes as usize);
        // The kernel puts XCR0 into the part of the legacy area that is left to software.
        let xcr0 = u64::from_ne_bytes(xstate[464..472].try_into().unwrap());
        assert_eq!(xcr0, cpu.xcr0);
    }

    #[test]
    fn only_what_programs_use_is_missed() {
        let cpu = |flags: &[&str], xcr0, xstate_bytes| Cpu {
            arch: "x86_64".into(),
            flags: flags.iter().map(|f| (*f).to_owned()).collect(),
            xcr0,
            xstate_bytes,
        };
        let old = cpu(&["sse2", "avx2"], 7, 832);
        let new = cpu(&["sse2", "avx2", "avx512f", "smep", "pti"], 0xe7, 2688);
        assert_eq!(missing(&old, &new), []);
        let reasons = missing(&new, &old);
        assert_eq!(reasons.len(), 2, "{reasons:?}");
        assert!(reasons[0].why.contains("avx512f") && !reasons[0].why.contains("smep"));
        assert!(reasons[1].why.contains("0xe0"));
        let other = Cpu { arch: "aarch64".into(), ..old.clone() };
        assert_eq!(missing(&other, &old).len(), 1);
    }
}
