// SPDX-License-Identifier: MIT OR Apache-2.0
//! The layers of the crate, held by a test: who may import whom, and where `unsafe` may stand.

use std::fs;
use std::path::{Path, PathBuf};

/// Every source file of a crate, by its path below `src`.
fn sources(of: &str) -> Vec<(PathBuf, String)> {
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
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(of).join("src");
    let mut found = Vec::new();
    walk(&root, &mut found);
    assert!(found.len() > 10, "the sources are not where they were");
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

/// The room that a path starts with: the directory, or the file's stem at the root. The simulation
/// of sessions is in no build but those of the fuzzers and of the tests.
fn room(path: &Path) -> String {
    if path.starts_with("proto/session/sim") {
        return "fuzzing".to_owned();
    }
    let first = path.components().next().unwrap().as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

/// The crates that the library is made of, by their directories.
const CRATES: [&str; 2] = ["", "crates/shmipc-core"];

#[test]
fn imports_go_down_only() {
    check_imports(
        "crates/shmipc-core",
        &[
            ("error", &[]),
            ("limits", &["error"]),
            ("config", &["error"]),
            ("wire", &["error", "config"]),
            ("payload", &[]),
            ("proto", &["error", "config", "wire", "payload"]),
            ("shm", &["error", "config", "wire", "limits", "payload"]),
            ("footprint", &["error", "config", "wire", "limits"]),
            // Looks at everything, and is in no build but those of the fuzzers and of the tests.
            ("fuzzing", &["error", "config", "wire", "payload", "proto", "shm"]),
        ],
    );
    check_imports(
        "",
        &[
            ("stats", &[]),
            ("preflight", &[]),
            ("exec", &[]),
            ("net", &["exec"]),
            ("reactor", &["exec", "net"]),
            ("session", &["exec", "net", "reactor", "stats"]),
            ("connect", &["exec", "net", "reactor", "session"]),
            ("server", &["exec", "net", "reactor", "session", "connect", "preflight"]),
            ("client", &["exec", "net", "reactor", "session", "connect"]),
            ("fuzzing", &["exec", "net", "session", "connect"]),
        ],
    );
}

fn check_imports(of: &str, allowed: &[(&str, &[&str])]) {
    for (path, text) in sources(of) {
        let room = room(&path);
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
        if !["exec", "fuzzing"].contains(&room.as_str()) {
            let code = code(&text).replace("shmipc-glommio", "").replace("`glommio`", "");
            assert!(!code.contains("glommio"), "{} knows glommio", path.display());
        }
    }
}

/// What `exec` has of glommio's under the names that the other rooms use.
fn names_of_glommio() -> Vec<String> {
    let mut names = Vec::new();
    for (path, text) in sources("") {
        if room(&path) != "exec" {
            continue;
        }
        for import in code(&text).split("use glommio::").skip(1) {
            let import = import.split(';').next().unwrap();
            let words = import.split(|c: char| !c.is_alphanumeric() && c != '_');
            // Types begin with a capital letter; modules and functions stand in no signature.
            let types = words.filter(|word| word.starts_with(char::is_uppercase));
            names.extend(types.map(str::to_owned));
        }
    }
    assert!(names.iter().any(|name| name == "Task"), "the search finds nothing any more");
    names
}

/// The parts of a file's code that callers of the crate can see the types of: public items up to
/// their bodies, headers of implementations, and associated types.
fn public_signatures(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut offset = 0;
    for line in code.split_inclusive('\n') {
        let start = line.trim_start();
        if ["pub ", "impl", "type "].iter().any(|begins| start.starts_with(begins)) {
            let rest = &code[offset + line.len() - start.len()..];
            let is_field =
                start.starts_with("pub ") && !start.contains('(') && start.contains(": ");
            let ends: &[char] = if is_field { &[',', '}'] } else { &['{', ';'] };
            found.push(&rest[..rest.find(ends).unwrap_or(rest.len())]);
        }
        offset += line.len();
    }
    found
}

#[test]
fn no_public_signature_names_glommio() {
    let names = names_of_glommio();
    let mut signatures = 0;
    for (path, text) in sources("") {
        let code = code(&text);
        for signature in public_signatures(&code) {
            signatures += usize::from(signature.starts_with("pub "));
            let mut words = signature.split(|c: char| !c.is_alphanumeric() && c != '_');
            let found = words.find(|word| *word == "glommio" || names.iter().any(|it| it == word));
            assert!(found.is_none(), "{} has {signature}", path.display());
        }
        // Renamed, or all at once, they would not be found above.
        let is_passed_on =
            code.contains("pub use glommio") || code.contains("pub use exec::runtime");
        assert!(!is_passed_on, "{} passes on what glommio has", path.display());
    }
    assert!(signatures > 200, "the search finds nothing any more");
}

#[test]
fn unsafe_stands_in_its_rooms_and_is_explained() {
    let rooms = [
        "shm/map/access.rs",
        "shm/map/sigbus.rs",
        "shm/map/trust.rs",
        "shm/chain/views.rs",
        "net/descriptor.rs",
        "net/fd_passing.rs",
    ];
    let sources = CRATES.into_iter().flat_map(sources);
    let mut blocks = 0;
    // The models, a test, watch payload that two sides reach.
    let models = [Path::new("shm/tests/models.rs"), Path::new("shm/tests/models/alone.rs")];
    for (path, text) in sources.filter(|(path, _)| !models.contains(&path.as_path())) {
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
    for (path, text) in CRATES.into_iter().flat_map(sources) {
        let lines = text.split("#[cfg(test)]\n").next().unwrap().lines().count();
        assert!(lines <= 560, "{} has {lines} lines without its tests", path.display());
        for (number, line) in text.lines().enumerate() {
            assert!(line.chars().count() <= 100, "{}:{} is long", path.display(), number + 1);
        }
        let starts = text.trim_start_matches("// SPDX-License-Identifier: MIT OR Apache-2.0\n");
        assert!(starts.starts_with("//!"), "{} does not say what it is for", path.display());
    }
}
