// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every document that a comment or a page names is in the repository, and has the heading that is
//! named with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where there is text to look at, below the root of the repository; those that are there.
const PLACES: [&str; 8] =
    ["apps", "benches", "crates", "docs", "examples", "fuzz/targets", "src", "tests"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file and every page, with its text.
fn texts() -> Vec<(PathBuf, String)> {
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
    let mut found = Vec::new();
    let places = PLACES.iter().map(|place| root().join(place));
    places.filter(|place| place.is_dir()).for_each(|place| walk(&place, &mut found));
    found.extend(fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path()));
    let is_text = |path: &PathBuf| path.extension().is_some_and(|end| end == "rs" || end == "md");
    let read = |path: PathBuf| fs::read_to_string(&path).ok().map(|text| (path, text));
    let texts: Vec<_> = found.into_iter().filter(is_text).filter_map(read).collect();
    assert!(texts.len() > 50, "the sources are not where they were");
    texts
}

/// The names of headings as links write them: lower case, dashes for spaces, and nothing else but
/// letters, digits and underscores.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        heading.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
    };
    headings.map(anchor).collect()
}

/// What a text names: a page, and the heading behind it if there is one. A heading without a page
/// is one of the same page.
fn citations(text: &str) -> Vec<(&str, Option<&str>)> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let mut found = Vec::new();
    for (end, _) in text.match_indices(".md") {
        let rest = &text[end + 3..];
        let page = &text[..end + 3];
        let page = &page[page.rfind(|c| !is_part(c)).map_or(0, |before| before + 1)..];
        let anchor = rest.strip_prefix('#').map(|rest| {
            &rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '-').unwrap_or(rest.len())]
        });
        // Otherwise it is a name that only begins like this, or an address elsewhere.
        let is_whole = !rest.starts_with(is_part) || rest.starts_with('.');
        if is_whole && page.len() > 3 && !page.contains("//") {
            found.push((page, anchor));
        }
    }
    for (at, _) in text.match_indices("](#") {
        let anchor = &text[at + 3..];
        found.push(("", Some(&anchor[..anchor.find(')').unwrap_or(anchor.len())])));
    }
    found
}

#[test]
fn what_is_named_is_there() {
    let mut problems = Vec::new();
    let mut count = 0;
    for (file, text) in texts() {
        // Its own examples are not citations.
        if file.ends_with("tests/citations.rs") {
            continue;
        }
        let beside = file.parent().unwrap();
        for (page, anchor) in citations(&text) {
            let places = [root().join(page), beside.join(page)];
            let target = match page {
                "" => Some(file.clone()),
                _ => places.into_iter().find(|place| place.is_file()),
            };
            let Some(target) = target else {
                problems.push(format!("{}: there is no {page}", file.display()));
                continue;
            };
            let Some(anchor) = anchor else { continue };
            count += 1;
            if !anchors(&fs::read_to_string(target).unwrap()).contains(anchor) {
                problems.push(format!("{}: no heading {page}#{anchor}", file.display()));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(count > 50, "{count} headings are named, so most were not found");
}

#[test]
fn citations_are_found() {
    let text = "see `docs/protocol.md#the-head`, (README.md), [x](#b-c) and a.mdx";
    let expected = [("docs/protocol.md", Some("the-head")), ("README.md", None), ("", Some("b-c"))];
    assert_eq!(citations(text), expected);
    let anchors = anchors("# The `head`, and\n## FallbackData\ntext");
    assert_eq!(anchors.into_iter().collect::<Vec<_>>(), ["fallbackdata", "the-head-and"]);
}
