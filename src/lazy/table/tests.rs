//! The table against the obvious model: one entry per page and address.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::proto::image::{Layout, Vma, VmaKind};

const PAGE: u64 = PAGE_BYTES;
/// Pages of the little world: 0..16 and 24..32 private, 40..48 and 56..64 the same shared object.
const WORLD: u64 = 96;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Is {
    /// A private page of the source.
    Own(u64),
    /// A page of the object.
    Shared(u64),
}

#[derive(Debug, Clone, Default)]
struct Model {
    /// What each address shows, per mm.
    mms: BTreeMap<MmId, BTreeMap<u64, Is>>,
    own: BTreeMap<MmId, BTreeSet<u64>>,
    shared: BTreeSet<u64>,
    asked: BTreeSet<u64>,
    installed: u64,
}

fn vma(start: u64, end: u64, object: Option<u64>) -> Vma {
    let kind = if object.is_some() { VmaKind::VmaAnonShared } else { VmaKind::VmaAnonPrivate };
    Vma {
        start: start * PAGE,
        end: end * PAGE,
        kind: kind.into(),
        shm_inode: object.map_or(0, |_| 7),
        offset: object.unwrap_or(0) * PAGE,
        ..Vma::default()
    }
}

fn layout() -> Layout {
    let vmas = vec![vma(0, 16, None), vma(24, 32, None), vma(40, 48, Some(0)), vma(56, 64, Some(4))];
    Layout { vmas, ..Layout::default() }
}

/// The object's page with this offset is named by the lowest mapping.
fn name(offset: u64) -> u64 {
    if offset < 8 { 40 + offset } else { 56 + offset - 4 }
}

impl Model {
    fn new(missing: &BTreeSet<u64>) -> Self {
        let mut shows = BTreeMap::new();
        let mut own = BTreeSet::new();
        let mut shared = BTreeSet::new();
        let lacks = |from: u64, to: u64| missing.range(from..to).next().is_some();
        for (from, to) in [(0, 16), (24, 32)] {
            if lacks(from, to) {
                shows.extend((from..to).map(|at| (at, Is::Own(at))));
                own.extend(missing.range(from..to));
            }
        }
        if lacks(40, 48) || lacks(56, 64) {
            shows.extend((40..48).map(|at| (at, Is::Shared(at - 40))));
            shows.extend((56..64).map(|at| (at, Is::Shared(at - 56 + 4))));
            shared.extend(missing.range(40..48).map(|at| at - 40));
            shared.extend(missing.range(56..64).map(|at| at - 56 + 4));
        }
        let mms = [(0, shows)].into();
        Self { mms, own: [(0, own)].into(), shared, ..Self::default() }
    }

    fn drop_unseen(&mut self) {
        if !self.mms.values().any(|m| m.values().any(|is| matches!(is, Is::Shared(_)))) {
            self.shared.clear();
        }
    }

    fn names(&self) -> BTreeSet<u64> {
        let own = self.own.values().flatten().copied();
        own.chain(self.shared.iter().map(|o| name(*o))).collect()
    }

    fn unmap(&mut self, mm: MmId, range: std::ops::Range<u64>) {
        let (shows, own) = (self.mms.get_mut(&mm).unwrap(), self.own.get_mut(&mm).unwrap());
        for at in range {
            if let Some(Is::Own(source)) = shows.remove(&at) {
                own.remove(&source);
            }
        }
        self.drop_unseen();
    }
}

#[derive(Debug, Clone)]
enum Op {
    Fault(u64),
    Arrive(u64, u64),
    Fork,
    Move { from: u64, to: u64, len: u64 },
    Unmap(u64, u64),
    Remove { start: u64, len: u64, hole: bool },
    Gone,
}

fn ops() -> impl Strategy<Value = Vec<(MmId, Op)>> {
    let at = 0..WORLD;
    let len = 1..12u64;
    let op = prop_oneof![
        4 => at.clone().prop_map(Op::Fault),
        4 => (0..64u64, len.clone()).prop_map(|(a, l)| Op::Arrive(a, l)),
        1 => Just(Op::Fork),
        2 => (at.clone(), at.clone(), len.clone()).prop_map(|(from, to, len)| Op::Move { from, to, len }),
        1 => (at.clone(), len.clone()).prop_map(|(a, l)| Op::Unmap(a, l)),
        2 => (at, len, any::<bool>()).prop_map(|(start, len, hole)| Op::Remove { start, len, hole }),
        1 => Just(Op::Gone),
    ];
    proptest::collection::vec((0..3u32, op), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn behaves_as_single_pages(missing in proptest::collection::btree_set(0..64u64, 1..40), ops in ops()) {
        // The same page by its second mapping is the same page.
        let missing: BTreeSet<u64> =
            missing.into_iter().filter(|at| (0..16).contains(at) || (24..32).contains(at)
                || (40..48).contains(at) || (56..64).contains(at)).collect();
        let mut set = Extents::new();
        missing.iter().for_each(|at| set.insert(at * PAGE, (at + 1) * PAGE));
        let (mut table, _) = Table::new(&layout(), &set).unwrap();
        let mut model = Model::new(&missing);
        let initial = model.own[&0].len() as u64 + model.shared.len() as u64;
        prop_assert_eq!(table.counts().initial, initial);
        for (mm, op) in ops {
            let alive: Vec<MmId> = model.mms.keys().copied().collect();
            let Some(&mm) = alive.get(mm as usize % alive.len().max(1)) else { break };
            match op {
                Op::Fault(at) => {
                    let source = match model.mms[&mm].get(&at) {
                        None => { prop_assert_eq!(table.fault(mm, at * PAGE + 5), Fault::Unknown); continue }
                        Some(Is::Own(s)) => model.own[&mm].contains(s).then_some(*s),
                        Some(Is::Shared(o)) => model.shared.contains(o).then_some(name(*o)),
                    };
                    let want = match source {
                        None => Fault::NotMissing { mm, address: at * PAGE, page: PAGE },
                        Some(s) if model.asked.insert(s) => Fault::Ask(s * PAGE),
                        Some(s) => Fault::AlreadyAsked(s * PAGE),
                    };
                    prop_assert_eq!(table.fault(mm, at * PAGE + 5), want);
                }
                Op::Arrive(start, len) => {
                    let (from, to) = (start * PAGE, (start + len) * PAGE);
                    let mut got = BTreeSet::new();
                    for step in table.plan(from, to) {
                        // In two parts, as when an event comes between.
                        let half = step.len / PAGE / 2 * PAGE;
                        for (done, len) in [(0, half), (half, step.len - half)] {
                            if len > 0 { table.installed(&step, done, len); }
                        }
                        for i in 0..step.len / PAGE {
                            let source = step.source / PAGE + i;
                            match step.place {
                                Place::Mapped { mm, address } => {
                                    let shown = model.mms[&mm].get(&(address / PAGE + i)).copied();
                                    let fits = shown == Some(Is::Own(source))
                                        || matches!(shown, Some(Is::Shared(o)) if name(o) == source);
                                    prop_assert!(fits, "{source} is not what {shown:?} is");
                                    let shared = matches!(shown, Some(Is::Shared(_)));
                                    prop_assert!(got.insert((if shared { u32::MAX } else { mm }, source)), "twice");
                                }
                                Place::Object { offset, .. } => {
                                    let offset = offset / PAGE + i;
                                    prop_assert_eq!(name(offset), source);
                                    prop_assert!(!model.mms.values().any(|m| m.values().any(|is| *is == Is::Shared(offset))));
                                    prop_assert!(got.insert((u32::MAX, source)), "twice");
                                }
                            }
                        }
                    }
                    let mut want = BTreeSet::new();
                    for (mm, own) in &mut model.own {
                        for source in start..start + len {
                            if own.remove(&source) { want.insert((*mm, source)); }
                        }
                    }
                    let shared: Vec<u64> = model.shared.iter().copied()
                        .filter(|o| (start..start + len).contains(&name(*o))).collect();
                    for offset in shared {
                        model.shared.remove(&offset);
                        want.insert((u32::MAX, name(offset)));
                    }
                    model.installed += want.len() as u64;
                    prop_assert_eq!(got, want);
                    table.arrived(from, to);
                    model.asked.retain(|s| !(start..start + len).contains(s));
                }
                Op::Fork => {
                    if model.mms.len() > 3 { continue }
                    let child = table.fork(mm).unwrap();
                    let (shows, own) = (model.mms[&mm].clone(), model.own[&mm].clone());
                    model.mms.insert(child, shows);
                    model.own.insert(child, own);
                }
                Op::Move { from, to, len } => {
                    if from + len > to && to + len > from { continue }
                    // As one thread does it: what is in the way goes first, the old place is told of later.
                    table.unmap(mm, to * PAGE, (to + len) * PAGE);
                    model.unmap(mm, to..to + len);
                    table.remap(mm, from * PAGE, to * PAGE, len * PAGE, true);
                    table.unmap(mm, from * PAGE, (from + len) * PAGE);
                    let shows = model.mms.get_mut(&mm).unwrap();
                    for i in 0..len {
                        if let Some(is) = shows.remove(&(from + i)) { shows.insert(to + i, is); }
                    }
                }
                Op::Unmap(start, len) => {
                    table.unmap(mm, start * PAGE, (start + len) * PAGE);
                    model.unmap(mm, start..start + len);
                }
                Op::Remove { start, len, hole } => {
                    table.remove(mm, start * PAGE, (start + len) * PAGE, hole);
                    for at in start..start + len {
                        match model.mms[&mm].get(&at) {
                            Some(Is::Own(source)) => { model.own.get_mut(&mm).unwrap().remove(source); }
                            Some(Is::Shared(offset)) if hole => { model.shared.remove(offset); }
                            _ => {}
                        }
                    }
                }
                Op::Gone => {
                    table.gone(mm);
                    model.mms.remove(&mm);
                    model.own.remove(&mm);
                    model.drop_unseen();
                }
            }
            let names: BTreeSet<u64> =
                table.missing().iter().flat_map(|(s, e)| s / PAGE..e / PAGE).collect();
            prop_assert_eq!(&names, &model.names());
            prop_assert_eq!(table.is_empty(), names.is_empty());
            let c = table.counts();
            let left = model.own.values().map(|o| o.len() as u64).sum::<u64>() + model.shared.len() as u64;
            prop_assert_eq!(c.installed, model.installed);
            prop_assert_eq!(c.initial + c.inherited, c.installed + c.dropped + left);
        }
    }
}

fn table(missing: &[(u64, u64)]) -> Table {
    let mut set = Extents::new();
    missing.iter().for_each(|(s, e)| set.insert(s * PAGE, e * PAGE));
    Table::new(&layout(), &set).unwrap().0
}

/// Where page `source` belongs in the process.
fn place(table: &Table, source: u64) -> Option<u64> {
    let step = table.plan(source * PAGE, (source + 1) * PAGE).into_iter().find(|s| s.mm == 0)?;
    match step.place {
        Place::Mapped { address, .. } => Some(address / PAGE),
        Place::Object { .. } => None,
    }
}

#[test]
fn moves_that_are_told_in_the_wrong_order() {
    // One thread moves 0..4 to 70, another moves 24..28 to where that was; the second is told first.
    let mut t = table(&[(0, 4), (24, 28)]);
    t.remap(0, 24 * PAGE, 0, 4 * PAGE, true);
    assert_eq!((place(&t, 1), place(&t, 25)), (None, Some(1)));
    assert_eq!((t.in_motion(PAGE, 2 * PAGE), t.in_motion(25 * PAGE, 26 * PAGE)), (Some(0), None));
    t.unmap(0, 24 * PAGE, 28 * PAGE);
    t.remap(0, 0, 70 * PAGE, 4 * PAGE, true);
    assert_eq!((place(&t, 1), place(&t, 25)), (Some(71), Some(1)));
    t.unmap(0, 0, 4 * PAGE);
    assert_eq!((place(&t, 1), place(&t, 25)), (Some(71), Some(1)));
    // From now on it is meant.
    t.quiet(0);
    t.unmap(0, 0, 4 * PAGE);
    assert_eq!((place(&t, 1), place(&t, 25)), (Some(71), None));
    assert_eq!((t.counts().dropped, t.in_motion(0, u64::MAX)), (4, None));
}

#[test]
fn an_unmapping_that_is_told_late() {
    let mut t = table(&[(0, 4), (24, 28)]);
    t.remap(0, 24 * PAGE, 0, 4 * PAGE, true);
    t.unmap(0, 0, 2 * PAGE);
    assert_eq!((place(&t, 25), t.counts().dropped), (Some(1), 2));
    // Nobody ever tells of the rest: it was not mapped.
    t.quiet(0);
    assert_eq!((place(&t, 25), t.counts().dropped, t.in_motion(0, u64::MAX)), (Some(1), 4, None));
}

#[test]
fn what_cannot_wait_is_refused() {
    let mut missing = Extents::new();
    missing.insert(16 * PAGE, 17 * PAGE);
    let refused = Table::new(&layout(), &missing).unwrap_err();
    assert_eq!(refused, TableError::Unsupported { start: 16 * PAGE, end: 17 * PAGE });
    let file = Layout {
        vmas: vec![Vma { kind: VmaKind::VmaFilePrivate.into(), ..vma(16, 17, None) }],
        ..Layout::default()
    };
    assert!(Table::new(&file, &missing).is_err());
    let huge =
        Layout { vmas: vec![Vma { page_bytes: HUGE_BYTES, ..vma(16, 17, None) }], ..Layout::default() };
    assert_eq!(Table::new(&huge, &missing).unwrap_err(), TableError::PageSize(16 * PAGE));
}

#[test]
fn a_huge_page_is_one() {
    let vma = Vma { page_bytes: HUGE_BYTES, ..vma(512, 3 * 512, None) };
    let layout = Layout { vmas: vec![vma], ..Layout::default() };
    let mut missing = Extents::new();
    missing.insert(HUGE_BYTES + PAGE, HUGE_BYTES + 2 * PAGE);
    let (mut t, registered) = Table::new(&layout, &missing).unwrap();
    assert_eq!(registered, [Registered { start: HUGE_BYTES, end: 3 * HUGE_BYTES, object: None }]);
    assert_eq!(t.fault(0, HUGE_BYTES + 77 * PAGE), Fault::Ask(HUGE_BYTES));
    assert_eq!(t.fault(0, HUGE_BYTES), Fault::AlreadyAsked(HUGE_BYTES));
    let none = Fault::NotMissing { mm: 0, address: 2 * HUGE_BYTES, page: HUGE_BYTES };
    assert_eq!(t.fault(0, 2 * HUGE_BYTES + PAGE), none);
    assert_eq!(t.unit(HUGE_BYTES, u64::MAX), (HUGE_BYTES, 3 * HUGE_BYTES));
    assert_eq!(t.unit(0, u64::MAX), (PAGE, HUGE_BYTES));
}

#[test]
fn a_private_mapping_of_an_object_waits_and_is_not_written() {
    let object = vma(40, 48, Some(0));
    let private = Vma { kind: VmaKind::VmaMemfdPrivate.into(), ..vma(0, 8, Some(0)) };
    let layout = Layout { vmas: vec![private, object], ..Layout::default() };
    let mut missing = Extents::new();
    missing.insert(40 * PAGE, 44 * PAGE);
    let (mut t, registered) = Table::new(&layout, &missing).unwrap();
    assert_eq!(registered.len(), 2);
    assert_eq!(t.fault(0, PAGE), Fault::Ask(41 * PAGE));
    assert_eq!(t.fault(0, 5 * PAGE), Fault::NotMissing { mm: 0, address: 45 * PAGE, page: PAGE });
    let steps = t.plan(41 * PAGE, 42 * PAGE);
    assert_eq!(steps[0].place, Place::Mapped { mm: 0, address: 41 * PAGE });
    assert_eq!(t.installed(&steps[0], 0, PAGE), [Wake { mm: 0, address: PAGE, len: PAGE }]);
}
