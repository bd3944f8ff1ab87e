//! `strftime` for chat templates that write today's date. UTC, English names: an answer must not depend on a server's locale.

/// Formats seconds since 1970 as Python's `strftime` does; unknown directives stay as they are.
pub fn strftime(format: &str, unix_seconds: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    let day = unix_seconds.div_euclid(86_400);
    let second = unix_seconds.rem_euclid(86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (year, month, date) = civil(day);
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[(day + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let half_day = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let directive = letters.next();
        // glibc's `%-d` leaves the padding out.
        let (directive, padded) = if directive == Some('-') { (letters.next(), false) } else { (directive, true) };
        let pad = |number: i64, width: usize| if padded { format!("{number:0width$}") } else { number.to_string() };
        match directive {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&pad(year.rem_euclid(100), 2)),
            Some('m') => out.push_str(&pad(month, 2)),
            Some('d') => out.push_str(&pad(date, 2)),
            Some('e') => out.push_str(&format!("{date:>2}")),
            Some('j') => out.push_str(&pad(day - days(year, 1, 1) + 1, 3)),
            Some('H') => out.push_str(&pad(hour, 2)),
            Some('I') => out.push_str(&pad(half_day, 2)),
            Some('M') => out.push_str(&pad(minute, 2)),
            Some('S') => out.push_str(&pad(second, 2)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('F') => out.push_str(&format!("{year}-{month:02}-{date:02}")),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a day number counted from 1970-01-01, in the proleptic Gregorian calendar.
///
/// Years are counted from March, so that the leap day is the last of its year; an era is 400 years, 146,097 days.
fn civil(day: i64) -> (i64, i64, i64) {
    let from_march_0000 = day + 719_468;
    let era = from_march_0000.div_euclid(146_097);
    let of_era = from_march_0000.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let date = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, date)
}

/// The inverse of [`civil`].
fn days(year: i64, month: i64, date: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let from_march = if month > 2 { month - 3 } else { month + 9 };
    let of_year = (153 * from_march + 2) / 5 + date - 1;
    era * 146_097 + 365 * year_of_era + year_of_era / 4 - year_of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_as_python_writes_them() {
        let check = |seconds: i64, format: &str, expected: &str| assert_eq!(strftime(format, seconds), expected);
        check(0, "%Y-%m-%d %H:%M:%S", "1970-01-01 00:00:00");
        check(1_709_210_096, "%d %b %Y", "29 Feb 2024");
        check(1_709_210_096, "%A, %B %-d, %Y %I:%M %p day %j", "Thursday, February 29, 2024 12:34 PM day 060");
        check(-1, "%F %T %a %y %e", "1969-12-31 23:59:59 Wed 69 31");
        check(0, "100%% %Q %", "100% %Q %");
    }

    #[test]
    fn every_day_of_eight_centuries_has_one_date() {
        let mut before = civil(-150_000);
        for day in -149_999..150_000 {
            let date = civil(day);
            assert!(date > before, "{date:?} after {before:?}");
            assert_eq!(days(date.0, date.1, date.2), day);
            before = date;
        }
    }
}
