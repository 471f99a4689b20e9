//! Charts as inline SVG: curves and bars, with axes whose ticks are 1, 2 or 5 times a power of ten.
//!
//! Colours and dashes are classes of the page's style, so that light, dark and print differ in one place only.

use std::fmt::Write as _;

/// Width and height of a chart in units of its view box.
const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 300.0;
/// Room for the names of ticks: left, right, top, bottom.
const LEFT: f64 = 84.0;
const RIGHT: f64 = 34.0;
const TOP: f64 = 22.0;
const BOTTOM: f64 = 42.0;
/// Kinds of colour and dash that the style has.
const KINDS: usize = 8;
/// An axis whose greatest value is more than so many times its least one counts in powers of ten.
const LOG_FROM: f64 = 40.0;

/// A value for people.
pub(super) type Show = fn(f64) -> String;

/// A curve.
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// A row of bars, one after the other.
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) parts: Vec<f64>,
}

/// Text that may stand in HTML.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// One axis: from values to a place between 0 and 1.
struct Axis {
    least: f64,
    most: f64,
    is_log: bool,
}

impl Axis {
    /// An axis for these values; in powers of ten when they are all above zero and far apart, and `may_log`.
    fn of(values: impl Iterator<Item = f64> + Clone, may_log: bool) -> Self {
        let most = values.clone().fold(0.0, f64::max);
        let least = values.filter(|value| *value > 0.0).fold(f64::INFINITY, f64::min);
        if may_log && least.is_finite() && most > least * LOG_FROM {
            let power =
                |value: f64, up: bool| 10f64.powf(if up { value.log10().ceil() } else { value.log10().floor() });
            return Self { least: power(least, false), most: power(most, true), is_log: true };
        }
        let step = Self::step(most.max(f64::MIN_POSITIVE));
        Self { least: 0.0, most: if most > 0.0 { (most / step).ceil() * step } else { 1.0 }, is_log: false }
    }

    fn step(most: f64) -> f64 {
        let power = 10f64.powf((most / 5.0).log10().floor());
        [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|step| most / step <= 6.0).unwrap_or(most)
    }

    fn place(&self, value: f64) -> f64 {
        let place = match self.is_log {
            true => (value.max(self.least) / self.least).log10() / (self.most / self.least).log10(),
            false => (value - self.least) / (self.most - self.least),
        };
        place.clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.is_log {
            let count = (self.most / self.least).log10().round() as i32;
            return (0..=count).map(|power| self.least * 10f64.powi(power)).collect();
        }
        let step = Self::step(self.most);
        (0..=(self.most / step).round() as u32).map(|no| f64::from(no) * step).collect()
    }
}

/// The class of a curve's or a bar's colour.
fn kind(place: usize) -> usize {
    place % KINDS
}

/// The classes of a curve: a colour that was used before gets another dash.
fn stroke(place: usize) -> String {
    format!("k{}{}", kind(place), if place < KINDS { "" } else { " again" })
}

fn legend(names: &[String], solid: bool) -> String {
    if names.len() < 2 {
        return String::new();
    }
    let entry = |(place, name): (usize, &String)| {
        let no = kind(place);
        let sign = match solid {
            true => format!("<rect class=\"f{no}\" x=\"0\" y=\"0\" width=\"26\" height=\"10\" rx=\"2\"/>"),
            false => {
                format!("<line class=\"{}\" x1=\"0\" y1=\"5\" x2=\"26\" y2=\"5\" stroke-width=\"2.5\"/>", stroke(place))
            }
        };
        format!("<li><svg viewBox=\"0 0 26 10\" aria-hidden=\"true\">{sign}</svg>{}</li>", escaped(name))
    };
    let entries: String = names.iter().enumerate().map(entry).collect();
    format!("<ul class=\"legend\">{entries}</ul>")
}

/// Curves over one axis; `marks` are vertical lines with names.
pub(super) fn curves(
    title: &str,
    (x_name, show_x): (&str, Show),
    show_y: Show,
    curves: &[Curve],
    marks: &[(f64, String)],
    may_log: bool,
) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let x_axis = Axis::of(points().map(|point| point.0).chain(marks.iter().map(|mark| mark.0)), may_log);
    let y_axis = Axis::of(points().map(|point| point.1), false);
    let x = |value: f64| LEFT + x_axis.place(value) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - y_axis.place(value) * (HEIGHT - TOP - BOTTOM);
    let mut svg = head(title, HEIGHT);
    for tick in y_axis.ticks() {
        let at = y(tick);
        put(
            &mut svg,
            format_args!(
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
                WIDTH - RIGHT
            ),
        );
        put(
            &mut svg,
            format_args!(
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                at + 4.0,
                show_y(tick)
            ),
        );
    }
    for tick in x_axis.ticks() {
        let at = x(tick);
        put(
            &mut svg,
            format_args!(
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                HEIGHT - BOTTOM + 18.0,
                show_x(tick)
            ),
        );
    }
    put(
        &mut svg,
        format_args!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{x_name}</text>", WIDTH - RIGHT, HEIGHT - 6.0),
    );
    let at_marks = marks.iter().map(|(at, name)| (x(*at), name.as_str()));
    at_marks.enumerate().for_each(|(place, mark)| draw_mark(&mut svg, place, mark));
    for (place, curve) in curves.iter().enumerate() {
        let points: Vec<String> =
            curve.points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
        put(&mut svg, format_args!("<polyline class=\"{}\" points=\"{}\"/>", stroke(place), points.join(" ")));
    }
    svg.push_str("</svg>");
    legend(&curves.iter().map(|curve| curve.name.clone()).collect::<Vec<_>>(), false) + &svg
}

/// A vertical line with its name, which stands on one of four lines.
fn draw_mark(svg: &mut String, place: usize, (at, name): (f64, &str)) {
    let (anchor, shift) = if at > WIDTH * 0.8 { ("end", -4.0) } else { ("start", 4.0) };
    let (bottom, line, name) = (HEIGHT - BOTTOM, TOP + 10.0 + 14.0 * (place % 4) as f64, escaped(name));
    put(svg, format_args!("<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom:.1}\"/>"));
    let x = at + shift;
    put(
        svg,
        format_args!("<text class=\"mark-name\" x=\"{x:.1}\" y=\"{line:.1}\" text-anchor=\"{anchor}\">{name}</text>"),
    );
}

/// Rows of bars beside each other in one row (`stacked`), or below each other.
pub(super) fn bars(title: &str, show: Show, parts: &[String], rows: &[Bar], stacked: bool) -> String {
    let thick = if stacked { 20.0 } else { 13.0 };
    let per_row = if stacked { 1 } else { parts.len().max(1) };
    let (row_height, left, right) = (thick * per_row as f64 + 14.0, 150.0, 110.0);
    let height = row_height * rows.len() as f64 + 8.0;
    let total = |row: &Bar| row.parts.iter().sum::<f64>();
    let axis = match stacked {
        true => Axis::of(rows.iter().map(total), false),
        false => Axis::of(rows.iter().flat_map(|row| row.parts.iter().copied()), true),
    };
    let length = |value: f64| axis.place(value) * (WIDTH - left - right);
    let mut svg = head(title, height);
    for (no, row) in rows.iter().enumerate() {
        let top = row_height * no as f64 + 6.0;
        let middle = top + thick * per_row as f64 / 2.0 + 4.0;
        put(
            &mut svg,
            format_args!(
                "<text class=\"name\" x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>",
                left - 10.0,
                escaped(&row.name)
            ),
        );
        let mut at = left;
        for (place, value) in row.parts.iter().enumerate() {
            let (y, wide) =
                if stacked { (top, length(*value)) } else { (top + thick * place as f64, length(*value).max(1.5)) };
            put(
                &mut svg,
                format_args!(
                    "<rect class=\"f{}\" x=\"{at:.1}\" y=\"{y:.1}\" width=\"{wide:.1}\" height=\"{:.1}\" rx=\"2\"/>",
                    kind(place),
                    thick - 2.0
                ),
            );
            if stacked {
                at += wide;
            } else {
                put(
                    &mut svg,
                    format_args!(
                        "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                        left + wide + 6.0,
                        y + thick - 3.0,
                        show(*value)
                    ),
                );
            }
        }
        if stacked {
            put(&mut svg, format_args!("<text x=\"{:.1}\" y=\"{middle:.1}\">{}</text>", at + 6.0, show(total(row))));
        }
    }
    svg.push_str("</svg>");
    let scale = if axis.is_log { "<p class=\"about\">Lengths count in powers of ten.</p>" } else { "" };
    legend(parts, true) + &svg + scale
}

fn head(title: &str, height: f64) -> String {
    let title = escaped(title);
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{title}\"><title>{title}</title>")
}

fn put(svg: &mut String, element: std::fmt::Arguments<'_>) {
    svg.write_fmt(element).expect("a string takes all that is written");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_ticks_and_count_in_powers_where_values_are_far_apart() {
        let axis = Axis::of([3.0, 17.3].into_iter(), true);
        assert_eq!((axis.ticks(), axis.is_log), (vec![0.0, 5.0, 10.0, 15.0, 20.0], false));
        let axis = Axis::of([0.02, 900.0].into_iter(), true);
        assert_eq!((axis.ticks().len(), axis.is_log), (6, true));
        assert!((axis.place(0.01), axis.place(1000.0)) == (0.0, 1.0) && axis.place(0.0) == 0.0);
        let nothing = Axis::of(std::iter::empty(), true);
        assert_eq!((nothing.place(0.0), nothing.most), (0.0, 1.0));
    }

    #[test]
    fn names_cannot_leave_their_place() {
        let curve = Curve { name: "<b>".to_owned(), points: vec![(0.0, 1.0), (2.0, 3.0)] };
        let show: Show = |value| format!("{value}");
        let svg = curves("a \"title\"", ("s", show), show, &[curve], &[(1.0, "</svg>".to_owned())], false);
        assert!(!svg.contains("<b>") && svg.contains("&lt;/svg&gt;") && svg.matches("</svg>").count() == 1, "{svg}");
    }
}
