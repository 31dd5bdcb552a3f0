//! Medians and tables.

/// The middle of some numbers, between the two middle ones of an even count; 0 if there are none.
pub(crate) fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    match numbers.len() {
        0 => 0.0,
        count => f64::midpoint(numbers[(count - 1) / 2], numbers[count / 2]),
    }
}

/// The number that so many percent of them do not exceed; 0 if there are none.
pub(crate) fn percentile(numbers: &mut [f64], percent: usize) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let last = numbers.len().saturating_sub(1);
    numbers.get(last * percent / 100).copied().unwrap_or(0.0)
}

/// Prints rows below a head, in the form of Markdown.
pub(crate) fn print(head: &[String], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).chain(head.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let line = |cells: &[String]| {
        let padded: Vec<String> =
            cells.iter().enumerate().map(|(column, cell)| format!("{cell:>w$}", w = width(column))).collect();
        println!("| {} |", padded.join(" | "));
    };
    line(head);
    let rule: Vec<String> =
        (0..head.len()).map(|column| format!("{}:", "-".repeat(width(column).max(1) - 1))).collect();
    line(&rule);
    rows.iter().for_each(|row| line(row));
    println!();
}

/// Owned words.
pub(crate) fn words(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}
