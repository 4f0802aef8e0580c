// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command lines of the examples, and what they print.
//!
//! Help goes to stdout, with status 0. A mistake goes to stderr, with how the command is used, and
//! status 2. A failure at run time is one line on stderr, with status 1. A reader that has closed
//! stdout ends a program quietly: it has seen what it wanted.

use std::env;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// A command that takes no arguments yet.
pub(crate) fn command(name: &'static str, about: &'static str) -> Command {
    Command::new(name).about(about)
}

/// An option with a value. When it is given again, the last one counts.
pub(crate) fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    option_once(name, value, help).overrides_with(name)
}

/// An option with a value, whose help ends with the default that the program applies itself. Pass
/// the constant that is applied, so that the two cannot differ.
pub(crate) fn option_with_default(
    name: &'static str,
    value: &'static str,
    help: &str,
    default: impl fmt::Display,
) -> Arg {
    option(name, value, "").help(format!("{help} [default: {default}]"))
}

/// An option with a value, which is a mistake to give twice.
pub(crate) fn option_once(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}

/// An option without a value. To give it again changes nothing.
pub(crate) fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help).overrides_with(name)
}

/// Reads the arguments of this process. `take` makes of them what the program works with, or says
/// what is wrong with them together.
///
/// # Errors
///
/// The status to end with: help was asked for, or there is a mistake. The user has been told.
pub(crate) fn read<T>(
    mut command: Command,
    take: impl FnOnce(&ArgMatches) -> Result<T, String>,
) -> Result<T, ExitCode> {
    let matches = command.try_get_matches_from_mut(env::args_os());
    let taken = matches.and_then(|matches| {
        take(&matches).map_err(|problem| command.error(ErrorKind::ValueValidation, problem))
    });
    taken.map_err(|error| tell_error(&error))
}

/// Reads the arguments of a program that takes none: `-h` is all there is to answer.
pub(crate) fn read_nothing(name: &'static str, about: &'static str) -> Result<(), ExitCode> {
    read(command(name, about), |_| Ok(()))
}

fn tell_error(error: &clap::Error) -> ExitCode {
    if error.use_stderr() {
        tell(format_args!("{}", error.to_string().trim_end()));
        return ExitCode::from(2);
    }
    end(print(format_args!("{}", error.to_string().trim_end())).map_err(|error| error.to_string()))
}

/// Writes a line, or several, to stdout. That the reader has gone is no error.
pub(crate) fn print(text: fmt::Arguments<'_>) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(io::Error::new(error.kind(), format!("write to stdout: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// Writes a line to stderr. That nobody reads there is no reason to stop.
pub(crate) fn tell(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The status of a program that is done. Tells why it has failed, if it has.
pub(crate) fn end(outcome: Result<(), impl fmt::Display>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(format_args!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}
