//! What to do next.
//!
//! Owns every decision of a node about bytes that it lacks: whom to ask, in which order and how much at once, when to
//! give up, when to ask again. It never does anything itself: it knows no clock, no sockets, no files, no tasks and
//! no randomness of its own. A driver feeds it facts ([`event::Event`]), the time and a seeded random state, and carries
//! out its requests ([`event::Action`]). The node daemon and the simulator drive the same code, and a recorded trace of
//! events gives the same actions every time: all state is integers in ordered containers.
//!
//! Data flows: facts -> [`flight::Flight::handle`] -> requests. [`peers`] chooses among holders, [`members`] says who
//! owns what, [`readahead`] guesses
//! what a reader wants next, [`profile`] knows it from earlier starts, [`completion`] says when and how the rest of an image
//! is fetched, [`class`] says what a failure means and [`limits`] bounds everything; [`record`] is how all of it is written down.

pub mod class;
pub mod completion;
pub mod event;
pub mod evict;
pub mod flight;
pub mod geometry;
pub mod limits;
pub mod members;
pub mod peers;
pub mod profile;
pub mod readahead;
pub mod record;
pub mod rng;
pub mod time;
