-- Time and ids.
--
-- surety.id_at and surety.format_time are declared stable. PostgreSQL does not expand an immutable function whose body
-- calls stable ones (date_part, to_char), and each call would cost four times as much.

create or replace function surety.time_now() returns timestamptz
language sql stable parallel safe
begin atomic
    select statement_timestamp() + coalesce((select clock.ahead from surety.clock), interval '0');
end;

comment on function surety.time_now() is
'The current time: the statement''s start. Only a test database can move it, by a row in surety.clock.';

create or replace function surety.id_at(p_prefix text, p_at timestamptz) returns text
language sql stable parallel safe
begin atomic
    select p_prefix || '_' || substr(encode(int8send(floor(date_part('epoch', p_at) * 1000)::bigint), 'hex'), 6);
end;

comment on function surety.id_at(text, timestamptz) is
'The lower bound of the ids of an instant: prefix, underscore, 11 hex digits of milliseconds.';

create or replace function surety.new_id(p_prefix text, p_at timestamptz) returns text
language sql volatile parallel restricted
begin atomic
    -- random() instead of gen_random_uuid(): a server without OpenSSL opens /dev/urandom for each uuid, which costs ten
    -- times as much as everything else here. Ids must be unique, not secret. They are short, because most of a
    -- payment's rows and index entries consist of them.
    select surety.id_at(p_prefix, p_at) || lpad(to_hex((random() * 4503599627370495)::bigint), 13, '0');
end;

comment on function surety.new_id(text, timestamptz) is
'A new id: prefix, underscore, 11 hex digits of milliseconds, 13 random ones. Ids of one prefix sort by time.';

create or replace function surety.time_of_id(p_id text) returns timestamptz
language sql immutable parallel safe
begin atomic
    select to_timestamp(('x' || lpad(split_part(p_id, '_', 2)::char(11), 16, '0'))::bit(64)::bigint / 1000.0);
end;

comment on function surety.time_of_id(text) is 'The time at which an id of surety.new_id was made, in milliseconds.';

insert into surety.environment (id, kind) select surety.new_id('env', surety.time_now()), 'production'
where not exists (select from surety.environment);
