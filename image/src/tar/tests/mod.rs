mod gnu_tar;
mod tree;
mod walker;
