// SPDX-License-Identifier: MIT OR Apache-2.0
//! The layers of the crate, held by a test: who may import whom, and where `unsafe` may stand.

use std::fs;
use std::path::{Path, PathBuf};

/// Every source file, by its path below `src`.
fn sources() -> Vec<(PathBuf, String)> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&root, &mut found);
    assert!(found.len() > 20, "the sources are not where they were");
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path.strip_prefix(&root).unwrap().to_owned(), text)
    };
    found.into_iter().map(read).collect()
}

/// The code of a file: without its tests, comments and the text of strings.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\n").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The room that a path starts with: the directory, or the file's stem at the root.
fn room(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

#[test]
fn imports_go_down_only() {
    let allowed: &[(&str, &[&str])] = &[
        ("error", &[]),
        ("config", &["error"]),
        ("stats", &["shm"]),
        ("preflight", &["error"]),
        ("wire", &["error", "config"]),
        ("proto", &["error", "config", "wire"]),
        ("shm", &["error", "config", "wire", "preflight"]),
        ("footprint", &["error", "config", "wire", "preflight"]),
        ("rt", &["error", "config", "footprint", "preflight", "stats", "wire", "proto", "shm"]),
        // Looks at everything, and is in no build but those of the fuzzers and of the tests.
        ("fuzzing", &["error", "config", "wire", "proto", "shm", "rt"]),
    ];
    for (path, text) in sources() {
        // A part of the other one, where it needs a runtime.
        let is_fuzzing = path == Path::new("rt/fuzzing.rs");
        let room = if is_fuzzing { "fuzzing".to_owned() } else { room(&path) };
        if room == "lib" {
            continue;
        }
        let (_, allowed) = allowed
            .iter()
            .find(|(name, _)| *name == room)
            .unwrap_or_else(|| panic!("{} is in no known room", path.display()));
        for part in code(&text).split("crate::").skip(1) {
            let name: String =
                part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            // What the crate's root exports belongs to `error` and `config`.
            let is_export = name.starts_with(char::is_uppercase);
            let is_fine = name == room || is_export || allowed.contains(&name.as_str());
            assert!(is_fine, "{} imports crate::{name}", path.display());
        }
        if !path.starts_with("rt") {
            assert!(!code(&text).contains("glommio"), "{} knows glommio", path.display());
        }
    }
}

#[test]
fn unsafe_stands_in_its_rooms_and_is_explained() {
    let rooms = [
        "shm/access.rs",
        "shm/fault.rs",
        "shm/region.rs",
        "shm/views.rs",
        "rt/doorbell.rs",
        "rt/fd_passing.rs",
        "rt/socket.rs",
    ];
    let mut blocks = 0;
    // The models, a test, watch payload that two sides reach.
    let models = [Path::new("shm/models.rs"), Path::new("shm/models/alone.rs")];
    for (path, text) in sources().into_iter().filter(|(path, _)| !models.contains(&path.as_path()))
    {
        let is_room = rooms.iter().any(|room| path == Path::new(room));
        for (number, line) in text.lines().enumerate() {
            let line = line.split("//").next().unwrap();
            let has_unsafe =
                line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
            if has_unsafe {
                assert!(is_room, "{}:{} has an unsafe block", path.display(), number + 1);
                blocks += 1;
            }
        }
    }
    assert!(blocks > 5, "the search finds nothing any more");
}

#[test]
fn files_stay_readable() {
    for (path, text) in sources() {
        let lines = text.split("#[cfg(test)]\n").next().unwrap().lines().count();
        assert!(lines <= 560, "{} has {lines} lines without its tests", path.display());
        for (number, line) in text.lines().enumerate() {
            assert!(line.chars().count() <= 100, "{}:{} is long", path.display(), number + 1);
        }
        let starts = text.trim_start_matches("// SPDX-License-Identifier: MIT OR Apache-2.0\n");
        assert!(starts.starts_with("//!"), "{} does not say what it is for", path.display());
    }
}
