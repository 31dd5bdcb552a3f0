//! Holds the arrows between the rooms of the crate: who may import whom, where `unsafe` and `tokio` may
//! be, and that no file grows beyond what one reads in a sitting.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has failed")]

use std::path::{Path, PathBuf};

/// Each room and the rooms it may import. What is not listed here may import nothing and fails the test,
/// so that a new room is a decision.
const ARROWS: &[(&str, &[&str])] = &[
    (
        "main",
        &[
            "cli",
            "config",
            "demo",
            "dest",
            "engine",
            "identity",
            "journal",
            "migration",
            "operator",
            "report",
            "source",
            "telemetry",
            "transport",
        ],
    ),
    ("cli", &["config", "demo", "identity", "migration", "pageserver"]),
    ("demo", &["testbed"]),
    // For the one call that the standard library lacks.
    ("testbed", &["engine"]),
    ("source", SIDE),
    ("dest", DEST),
    ("sim", &["config", "dest", "journal", "migration", "proto", "source", "wire"]),
    ("report", &["engine"]),
    // It shows the migrations of both sides, and knows neither.
    ("operator", &["engine", "journal", "migration", "report"]),
    ("hello", &["journal", "proto", "wire"]),
    ("journal", &["engine", "migration"]),
    ("migration", &[]),
    // It carries page frames beside the messages; its thread for faults asks the engine for priority.
    ("transport", &["config", "engine", "identity", "migration", "pageserver", "proto", "wire"]),
    ("pageserver", &["engine", "proto", "wire"]),
    // The options of the pages and of the addresses are parsed where they are used.
    ("config", &["engine", "pageserver"]),
    ("identity", &[]),
    ("telemetry", &[]),
    // Knows the process and its memory; the pages come from whoever calls it.
    ("lazy", &["engine", "proto", "report"]),
    // Plain types only: why a move is refused.
    ("wire", &["engine", "proto"]),
    // The image types are the generated messages themselves.
    ("engine", &["proto"]),
    ("proto", &[]),
];

/// Source and destination: never each other.
const SIDE: &[&str] = &[
    "config",
    "engine",
    "hello",
    "identity",
    "journal",
    "migration",
    "operator",
    "pageserver",
    "proto",
    "report",
    "telemetry",
    "transport",
    "wire",
];

/// The destination, with the pages that it misses.
const DEST: &[&str] = &[
    "config",
    "engine",
    "hello",
    "identity",
    "journal",
    "lazy",
    "migration",
    "operator",
    "pageserver",
    "proto",
    "report",
    "telemetry",
    "transport",
    "wire",
];

/// Words that may not appear in the code of a room, with the reason.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    ("engine", &["tokio::", "quinn::", "rustls::"], "the engine knows no network and blocks"),
    ("lazy", &["tokio::", "quinn::"], "faults are answered by threads, and pages come from elsewhere"),
    ("pageserver", &["quinn::", "rustls::"], "frames are packed without a network"),
    ("testbed", &["tokio::", "quinn::"], "the grounds are simple and blocking"),
];

/// Longer files have more than one purpose.
const MOST_LINES: usize = 500;

#[test]
fn imports_follow_the_arrows() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let room = room(&path);
        if room == "lib" {
            continue;
        }
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == room) else {
            wrong.push(format!("{}: the room {room:?} is not in the table", path.display()));
            continue;
        };
        for target in imports(&code(&text)) {
            if target != room && !allowed.contains(&target.as_str()) {
                wrong.push(format!("{}: {room} may not import {target}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn rooms_keep_to_their_means() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let code = code(&text);
        for (name, words, reason) in FORBIDDEN.iter().filter(|(name, _, _)| *name == room(&path)) {
            for word in words.iter().filter(|word| code.contains(**word)) {
                wrong.push(format!("{}: {word} in {name}: {reason}", path.display()));
            }
        }
        let fenced = path.starts_with("engine/sys") || path == Path::new("engine/sys.rs");
        if !fenced && code.lines().any(|line| line.contains("unsafe {") || line.contains("unsafe fn")) {
            wrong.push(format!("{}: unsafe outside of engine::sys", path.display()));
        }
        if path.file_name().is_some_and(|name| name == "machine.rs") {
            for word in ["tokio", "Instant::now", "SystemTime", "libc::", "nix::", "crate::engine::sys"] {
                if code.contains(word) {
                    wrong.push(format!("{}: {word} in a machine without I/O", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn files_are_short_and_say_what_they_are() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        // Tests at the end of a file are not counted.
        let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
        if lines > MOST_LINES {
            wrong.push(format!("{}: {lines} lines", path.display()));
        }
        if !text.starts_with("//!") {
            wrong.push(format!("{}: does not begin with what it is", path.display()));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_table_has_no_cycle() {
    fn reaches(from: &str, to: &str, seen: &mut Vec<String>) -> bool {
        if seen.iter().any(|name| name == from) {
            return false;
        }
        seen.push(from.to_owned());
        let next = ARROWS.iter().find(|(name, _)| *name == from).map_or(&[][..], |(_, allowed)| allowed);
        next.iter().any(|name| *name == to || reaches(name, to, seen))
    }
    for (room, _) in ARROWS {
        assert!(!reaches(room, room, &mut Vec::new()), "{room} imports itself by way of others");
    }
}

/// All sources with their paths below `src/`.
fn sources() -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, root: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(folder).expect("the folder is read") {
            let path = entry.expect("the entry is read").path();
            if path.is_dir() {
                walk(&path, root, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("the file is read");
                found.push((path.strip_prefix(root).expect("below the root").to_owned(), text));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&root, &root, &mut found);
    assert!(found.len() > 5, "the sources are elsewhere");
    found
}

/// The part before comments, so that prose may name anything.
fn code(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn room(path: &Path) -> String {
    let first = path.iter().next().expect("a path has parts").to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// The rooms named after `crate::` (or, in the binary, after `migrate::`), also in a braced list.
fn imports(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for start in ["crate::", "migrate::"] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back().unwrap_or(' ');
            // `migrate::` is also a word in the names of protocol packages.
            if before.is_alphanumeric() || before == '_' || before == ':' || before == '"' {
                continue;
            }
            let rest = &code[at + start.len()..];
            let names: Vec<&str> = match rest.strip_prefix('{') {
                Some(list) => top_level(list),
                None => vec![rest],
            };
            found.extend(
                names
                    .iter()
                    .map(|name| identifier(name))
                    .filter(|name| name.chars().next().is_some_and(char::is_lowercase)),
            );
        }
    }
    found
}

/// The items of a braced list, nested lists left out.
fn top_level(list: &str) -> Vec<&str> {
    let (mut depth, mut start, mut items) = (0, 0, Vec::new());
    for (at, letter) in list.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => {
                items.push(&list[start..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items
}

fn identifier(text: &str) -> String {
    text.trim_start().chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
}
