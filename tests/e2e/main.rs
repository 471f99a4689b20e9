//! End to end, on the real command and real parts. One binary, because each would be linked with everything.

mod command;
mod containerd;
mod crash;
mod faults;
mod first_pull;
mod from_peer;
mod install;
mod keeper;
mod keeper_load;
mod lazy_images;
mod loops;
mod many;
mod members;
mod memory;
mod mounts;
mod observe;
mod outage;
mod peers;
mod prepare;
mod programs;
mod random_reads;
mod refused;
mod rounds;
mod same_tree;
mod space;
mod systemd;
