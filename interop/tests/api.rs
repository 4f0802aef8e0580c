// SPDX-License-Identifier: MIT OR Apache-2.0
//! The public items of both crates are those of `docs/api/`, so that a review sees each change of
//! them.
//!
//! `SHMIPC_UPDATE_API=1 cargo test -p shmipc-interop --test api` writes the lists anew.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use syn::{
    Attribute, Fields, File, ImplItem, Item, ItemImpl, ItemUse, TraitItem, Type, UseTree,
    Visibility,
};

/// The items of a crate's files, without tests, by the path of their module.
struct Source {
    modules: BTreeMap<String, Vec<Item>>,
}

impl Source {
    fn read(root: &Path) -> Self {
        let mut source = Self { modules: BTreeMap::new() };
        source.read_file(&root.join("lib.rs"), "", &[]);
        source
    }

    /// Reads a file, and the files of its modules. `inline` are modules that it is nested in.
    fn read_file(&mut self, file: &Path, path: &str, items: &[Item]) {
        let parsed;
        let items = if items.is_empty() {
            let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{file:?}: {e}"));
            parsed = syn::parse_file(&text).unwrap().items;
            &parsed
        } else {
            items
        };
        for item in items {
            let Item::Mod(module) = item else { continue };
            if is_left_out(&module.attrs) {
                continue;
            }
            let name = module.ident.to_string();
            let path = if path.is_empty() { name.clone() } else { format!("{path}::{name}") };
            match &module.content {
                Some((_, items)) => self.read_file(file, &path, items),
                None => self.read_file(&file_of(file, &name), &path, &[]),
            }
        }
        let kept = items.iter().filter(|item| !is_left_out(attributes(item))).cloned();
        self.modules.insert(path.to_owned(), kept.collect());
    }

    /// The public item of this name: in this module, or wherever there is one.
    fn find(&self, module: &str, name: &str) -> Option<&Item> {
        let is_it = |item: &&Item| is_public(item) && name_of(item).as_deref() == Some(name);
        let here = self.modules.get(module).into_iter().flatten().find(is_it);
        here.or_else(|| self.modules.values().flatten().find(is_it))
    }

    /// What is implemented for a type.
    fn impls(&self, name: &str) -> impl Iterator<Item = &ItemImpl> {
        self.modules.values().flatten().filter_map(move |item| match item {
            Item::Impl(block) if self_name(&block.self_ty).as_deref() == Some(name) => Some(block),
            _ => None,
        })
    }

    /// The public names of a module and of the public modules in it, sorted.
    fn public_names(&self, module: &str, found: &mut Vec<(String, String)>) {
        for item in self.modules.get(module).into_iter().flatten() {
            match item {
                Item::Mod(inner) if matches!(inner.vis, Visibility::Public(_)) => {
                    let path = match module {
                        "" => inner.ident.to_string(),
                        outer => format!("{outer}::{}", inner.ident),
                    };
                    self.public_names(&path, found);
                }
                Item::Mod(_) | Item::Use(_) | Item::Impl(_) => {}
                item if is_public(item) => {
                    found.extend(name_of(item).map(|name| (module.to_owned(), name)));
                }
                _ => {}
            }
        }
        found.sort();
    }

    /// An item as its users see it, with what is implemented for it.
    fn describe(&self, module: &str, name: &str) -> String {
        let item = self.find(module, name).unwrap_or_else(|| panic!("no {module}::{name}"));
        let mut items = vec![shown(item.clone())];
        items
            .extend(self.impls(name).filter_map(|block| shown_impl(block.clone())).map(Item::Impl));
        prettyplease::unparse(&File { shebang: None, attrs: Vec::new(), items })
    }
}

/// Where the source of a module is that a file declares.
fn file_of(file: &Path, name: &str) -> PathBuf {
    let directory = match file.file_stem().and_then(|stem| stem.to_str()) {
        Some("lib" | "mod") => file.parent().unwrap().to_owned(),
        _ => file.with_extension(""),
    };
    let flat = directory.join(format!("{name}.rs"));
    if flat.exists() { flat } else { directory.join(name).join("mod.rs") }
}

/// Whether something is only there for tests and fuzzers.
fn is_left_out(attributes: &[Attribute]) -> bool {
    attributes.iter().filter(|attribute| attribute.path().is_ident("cfg")).any(|attribute| {
        let condition = match &attribute.meta {
            syn::Meta::List(list) => list.tokens.to_string(),
            _ => String::new(),
        };
        ["test", "fuzzing", "loom"].iter().any(|name| condition.contains(name))
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn name_of(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        _ => return None,
    };
    Some(name.to_string())
}

fn is_public(item: &Item) -> bool {
    let visibility = match item {
        Item::Const(item) => &item.vis,
        Item::Enum(item) => &item.vis,
        Item::Fn(item) => &item.vis,
        Item::Static(item) => &item.vis,
        Item::Struct(item) => &item.vis,
        Item::Trait(item) => &item.vis,
        Item::Type(item) => &item.vis,
        _ => return false,
    };
    matches!(visibility, Visibility::Public(_))
}

fn self_name(of: &Type) -> Option<String> {
    match of {
        Type::Path(path) => path.path.segments.last().map(|segment| segment.ident.to_string()),
        _ => None,
    }
}

/// Keeps the attributes that users of an item depend on.
fn keep_promises(attributes: &mut Vec<Attribute>) {
    let kept = ["derive", "must_use", "non_exhaustive", "repr", "deprecated"];
    attributes.retain(|attribute| kept.iter().any(|name| attribute.path().is_ident(name)));
}

fn keep_public_fields(fields: &mut Fields) {
    let is_shown = |visibility: &Visibility| matches!(visibility, Visibility::Public(_));
    match fields {
        Fields::Named(fields) => {
            let shown = fields.named.iter().filter(|field| is_shown(&field.vis)).cloned();
            fields.named = shown.collect();
            fields.named.iter_mut().for_each(|field| field.attrs.clear());
        }
        Fields::Unnamed(fields) => {
            let shown = fields.unnamed.iter().filter(|field| is_shown(&field.vis)).cloned();
            fields.unnamed = shown.collect();
            fields.unnamed.iter_mut().for_each(|field| field.attrs.clear());
        }
        Fields::Unit => {}
    }
}

/// An item without what its users do not see: bodies, private fields, comments.
fn shown(mut item: Item) -> Item {
    let nothing = || syn::parse_quote!({});
    match &mut item {
        Item::Const(item) => {
            keep_promises(&mut item.attrs);
            *item.expr = syn::parse_quote!(_);
        }
        Item::Static(item) => {
            keep_promises(&mut item.attrs);
            *item.expr = syn::parse_quote!(_);
        }
        Item::Enum(item) => {
            keep_promises(&mut item.attrs);
            for variant in &mut item.variants {
                keep_promises(&mut variant.attrs);
                variant.fields.iter_mut().for_each(|field| field.attrs.clear());
            }
        }
        Item::Fn(item) => {
            keep_promises(&mut item.attrs);
            *item.block = nothing();
        }
        Item::Struct(item) => {
            keep_promises(&mut item.attrs);
            keep_public_fields(&mut item.fields);
        }
        Item::Trait(item) => {
            keep_promises(&mut item.attrs);
            for item in &mut item.items {
                if let TraitItem::Fn(method) = item {
                    keep_promises(&mut method.attrs);
                    method.default = method.default.as_ref().map(|_| nothing());
                } else if let TraitItem::Type(of) = item {
                    keep_promises(&mut of.attrs);
                }
            }
        }
        Item::Type(item) => keep_promises(&mut item.attrs),
        _ => {}
    }
    item
}

/// The public methods of a block; of a trait's block its header alone.
fn shown_impl(mut block: ItemImpl) -> Option<ItemImpl> {
    block.attrs.clear();
    if block.trait_.is_some() {
        block.items.retain(|item| matches!(item, ImplItem::Type(_)));
        return Some(block);
    }
    block.items.retain_mut(|item| match item {
        ImplItem::Fn(method) if matches!(method.vis, Visibility::Public(_)) => {
            let is_shown = !is_left_out(&method.attrs);
            keep_promises(&mut method.attrs);
            method.block = syn::parse_quote!({});
            is_shown
        }
        ImplItem::Const(constant) if matches!(constant.vis, Visibility::Public(_)) => {
            keep_promises(&mut constant.attrs);
            constant.expr = syn::parse_quote!(_);
            true
        }
        _ => false,
    });
    (!block.items.is_empty()).then_some(block)
}

/// The paths that a `use` names.
fn used(tree: &UseTree, path: &[String], found: &mut Vec<Vec<String>>) {
    let with = |name: String| path.iter().cloned().chain([name]).collect::<Vec<_>>();
    match tree {
        UseTree::Path(inner) => used(&inner.tree, &with(inner.ident.to_string()), found),
        UseTree::Name(name) => found.push(with(name.ident.to_string())),
        UseTree::Group(group) => group.items.iter().for_each(|tree| used(tree, path, found)),
        UseTree::Rename(_) | UseTree::Glob(_) => panic!("exports are listed by their names"),
    }
}

/// What the root of a crate exports: crate, module and name.
fn exports(source: &Source) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for item in &source.modules[""] {
        if let Item::Use(ItemUse { vis: Visibility::Public(_), tree, .. }) = item {
            used(tree, &[], &mut found);
        }
    }
    found.sort_by(|one, other| one.last().cmp(&other.last()));
    found
}

fn check(name: &str, listing: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let path = root.join("docs/api").join(name);
    if std::env::var_os("SHMIPC_UPDATE_API").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        return fs::write(&path, listing).unwrap();
    }
    let listed = fs::read_to_string(&path).unwrap_or_default();
    let differs = listed.lines().zip(listing.lines()).position(|(was, is)| was != is);
    let differs = differs.or((listed != listing).then_some(listed.lines().count()));
    if let Some(line) = differs {
        let is = listing.lines().nth(line).unwrap_or("the end");
        panic!(
            "{}:{}: the code has `{is}`. If that is meant, write the list anew: \
             SHMIPC_UPDATE_API=1 cargo test -p shmipc-interop --test api",
            path.display(),
            line + 1
        );
    }
}

#[test]
fn the_public_items_are_those_that_are_listed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let core = Source::read(&root.join("crates/shmipc-core/src"));
    let front = Source::read(&root.join("src"));
    let mut listing = String::new();
    for path in exports(&front) {
        let (name, module) = path.split_last().unwrap();
        let (source, module) = match module.split_first() {
            Some((first, rest)) if first == "shmipc_core" => (&core, rest.join("::")),
            _ => (&front, module.join("::")),
        };
        match source.modules.contains_key(name) && source.find("", name).is_none() {
            true => writeln!(listing, "pub mod {name}; // as shmipc_core::{name}\n").unwrap(),
            false => writeln!(listing, "{}", source.describe(&module, name)).unwrap(),
        }
    }
    check("shmipc-glommio.txt", &listing);

    let mut names = Vec::new();
    core.public_names("", &mut names);
    let mut listing = String::new();
    for (module, name) in names {
        writeln!(listing, "// {module}\n{}", core.describe(&module, &name)).unwrap();
    }
    check("shmipc-core.txt", &listing);
}
