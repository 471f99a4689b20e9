mod lifecycle;
mod random;
mod seeding;
mod world;
