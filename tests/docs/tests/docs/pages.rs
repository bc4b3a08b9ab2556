//! Reading pages, and their links.

use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// A page, by its path from the root.
pub struct Page {
    pub path: PathBuf,
    pub text: String,
}

/// A fenced block.
pub struct Block {
    pub language: String,
    pub text: String,
    /// Of the fence, from 1.
    pub line: usize,
}

/// What strangers read.
pub fn pages() -> Vec<Page> {
    let root = root();
    let mut paths: Vec<PathBuf> = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CHANGELOG.md",
        "charts/sluice/README.md",
        "tests/cluster/README.md",
    ]
    .map(PathBuf::from)
    .into();
    let mut docs: Vec<_> = std::fs::read_dir(root.join("docs"))
        .unwrap()
        .map(|entry| Path::new("docs").join(entry.unwrap().file_name()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    docs.sort();
    paths.extend(docs);
    paths.into_iter().map(|path| Page { text: std::fs::read_to_string(root.join(&path)).unwrap(), path }).collect()
}

impl Page {
    pub fn blocks(&self) -> Vec<Block> {
        let mut found = Vec::new();
        let mut open: Option<Block> = None;
        for (index, line) in self.text.lines().enumerate() {
            match (line.trim_start().strip_prefix("```"), &mut open) {
                (Some(language), None) => {
                    open = Some(Block { language: language.trim().to_owned(), text: String::new(), line: index + 1 });
                }
                (Some(_), Some(_)) => found.extend(open.take()),
                (None, Some(block)) => {
                    block.text.push_str(line);
                    block.text.push('\n');
                }
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{}: a fence is not closed", self.path.display());
        found
    }

    /// Everything but fenced and indented blocks.
    pub fn prose(&self) -> impl Iterator<Item = (usize, &str)> {
        let mut fenced = false;
        self.text.lines().enumerate().filter_map(move |(index, line)| {
            if line.trim_start().starts_with("```") {
                fenced = !fenced;
                return None;
            }
            (!fenced && !line.starts_with("    ")).then_some((index + 1, line))
        })
    }

    /// As GitHub makes them of headings.
    fn anchors(&self) -> BTreeSet<String> {
        let headings = self.prose().filter(|(_, line)| line.starts_with('#'));
        headings
            .map(|(_, line)| {
                let words = line.trim_start_matches('#').trim().to_lowercase();
                words
                    .chars()
                    .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
                    .collect::<String>()
                    .replace(' ', "-")
            })
            .collect()
    }
}

/// Text and target of each `[text](target)`.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target)
}

/// Without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            Component::Normal(_) | Component::RootDir | Component::Prefix(_) => normal.push(part),
        }
    }
    normal
}

#[test]
fn every_relative_link_leads_to_a_file_and_a_heading_that_are_there() {
    let pages = pages();
    let mut broken = Vec::new();
    for page in &pages {
        for (line, text) in page.prose() {
            for target in links(text).filter(|target| !target.contains("://") && !target.starts_with("mailto:")) {
                let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
                let path =
                    if file.is_empty() { page.path.clone() } else { normal(&page.path.parent().unwrap().join(file)) };
                let there = root().join(&path).exists();
                let known =
                    pages.iter().find(|page| page.path == path).is_none_or(|page| page.anchors().contains(anchor));
                if !there || (!anchor.is_empty() && !known) {
                    broken.push(format!("{}:{line}: {target}", page.path.display()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere:\n{}", broken.join("\n"));
}

#[test]
fn the_readme_leads_to_every_page() {
    let pages = pages();
    let readme = &pages[0];
    for page in pages.iter().filter(|page| page.path.starts_with("docs")) {
        let link = format!("({})", page.path.display());
        assert!(readme.text.contains(&link), "README.md does not lead to {}", page.path.display());
    }
}

#[test]
fn every_field_that_a_page_names_is_in_the_schema() {
    let kinds =
        sluice_crds::crds().into_iter().flat_map(|crd| sluice_docs::fields(&serde_json::to_value(&crd).unwrap()));
    let known: BTreeSet<String> = kinds.map(|field| field.path.replace("[]", "")).collect();
    // Of Services, Deployments and Pods.
    let foreign = ["spec.selector", "spec.template", "spec.os.name", "status.podIP"];
    let mut unknown = Vec::new();
    // Two pages name the fields of others.
    let ours = |page: &&Page| !page.path.to_string_lossy().contains("coming-from");
    for page in pages().iter().filter(ours) {
        for (line, text) in page.prose() {
            for code in text.split('`').skip(1).step_by(2) {
                let path: String = code.replace("[]", "");
                let path = path.split([':', '=', ' ']).next().unwrap();
                let a_field = (path.starts_with("spec.") || path.starts_with("status."))
                    && path.chars().all(|c| c.is_ascii_alphanumeric() || c == '.');
                if a_field && !known.contains(path) && !foreign.contains(&path) {
                    unknown.push(format!("{}:{line}: {code}", page.path.display()));
                }
            }
        }
    }
    assert!(unknown.is_empty(), "no kind of ours has these fields:\n{}", unknown.join("\n"));
}
